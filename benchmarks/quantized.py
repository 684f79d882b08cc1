"""QLoRA (nf4, double quantization) beside our LoRA over 16 bits, and beside peft with bitsandbytes.

    python benchmarks/quantized.py [--quick] [--only time,memory-bf16,memory-fp32,load] [--shape 0.5b|1b]

Qwen2.5-0.5B's shapes with random weights, or TinyLlama-1.1B's; all-linear r=8, one row of 512 tokens, every one learned
from. `--keep FOLDER` keeps the model for the next call, so that each case can have a call of its own.

Memory is the most that a fresh process held (VmHWM), loading included, less what it held after its imports ("training
memory"); layers are computed again in the backward pass on all sides. QLoRA and LoRA are both computed in bf16, with
16-bit embeddings, as on hardware that has bf16 instructions.
Time is measured in fp32 on all sides, since processors without bf16 instructions emulate them: QLoRA beside LoRA over
fp32 weights, which is the faster of the two unquantized ways here. All activations are kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from big_model import high_water
from pairs import Case, report

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MB = 1e6
Step = Callable[[], float]


SHAPES: dict[str, dict[str, Any]] = {
    "0.5b": {"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
             "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
             "tie_word_embeddings": True},
    "1b": {"model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
           "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4, "tie_word_embeddings": False},
}
CASES = ("time", "memory-bf16", "memory-fp32", "load")


def write_model(folder: Path, shape: dict[str, Any]) -> None:
    """A model folder of this shape in bf16."""
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = AutoConfig.for_model(**shape, dtype="bfloat16")
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="500MB")
    core = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, "<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)


def batch_of(tokens: int) -> dict[str, torch.Tensor]:
    """One row of random tokens."""
    ids = torch.randint(5, 30000, (1, tokens), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def ours(folder: Path, dtype: str, quantize: Any, tokens: int, *, recompute: bool) -> tuple[Step, Any]:
    """A step of ours, and its board."""
    import deltaw
    from deltaw.bases import load_base
    from deltaw.train.memory import recompute_activations
    from deltaw.train.objective import CausalLoss
    from deltaw.train.optimizer import adamw

    model = load_base(str(folder), dtype=dtype, quantize=quantize).model.train()
    board = deltaw.attach(model, deltaw.LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR), seed=0)
    batch, objective = batch_of(tokens), CausalLoss()
    board.share_inputs(lambda: objective.loss(model, {n: t[:, :64] for n, t in batch.items()}))
    if recompute:
        recompute_activations(model)
    optimizer, units = adamw(board.parameters("default"), learning_rate=1e-4), objective.units(batch)

    def step() -> float:
        loss = objective.loss(model, batch) / units
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step, board


def peft_bitsandbytes(folder: Path, dtype: str, tokens: int, *, recompute: bool,
                      factors: dict[str, torch.Tensor] | None = None) -> Step:
    """The same step by transformers, peft and bitsandbytes."""
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    number = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=number, quantization_config=BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=number))
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR,
                                                       task_type="CAUSAL_LM")).train()
    for name, parameter in model.named_parameters():
        if factors is not None and ".lora_A." in name:
            site = name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")
            parameter.data.copy_(factors[f"{site}.lora_A"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0,
                                  fused=True)
    batch = batch_of(tokens)

    def step() -> float:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def child(side: str, folder: Path, dtype: str, tokens: int) -> None:
    """One side in this process: what it held at most, and after its imports."""
    import bitsandbytes  # noqa: F401

    if side == "peft":
        import peft  # noqa: F401
    before = high_water()
    if side == "load":
        from deltaw.bases import load_base
        from deltaw.train.memory import memory_in_use

        began = time.perf_counter()
        model = load_base(str(folder), dtype=dtype, quantize="nf4").model
        seconds = time.perf_counter() - began
        largest = max(p.numel() * (2 if dtype == "bf16" else 4) for p in model.parameters() if p.is_floating_point())
        print(json.dumps({"before": before, "peak": high_water(), "final": memory_in_use(), "largest": largest,
                          "seconds": seconds, "losses": []}))
        return
    if side == "peft":
        step = peft_bitsandbytes(folder, dtype, tokens, recompute=True)
    else:
        step, _ = ours(folder, dtype, "nf4" if side == "qlora" else None, tokens, recompute=True)
    losses = [step() for _ in range(2)]
    print(json.dumps({"before": before, "peak": high_water(), "losses": losses}))


def measured(side: str, folder: Path, dtype: str, tokens: int) -> dict[str, Any]:
    """The figures of a fresh process."""
    command = [sys.executable, __file__, "--child", side, "--folder", str(folder), "--dtype", dtype, "--tokens",
               str(tokens)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"  {side:6} {dtype}: peak {found['peak'] / MB:6.0f} MB, {found['before'] / MB:4.0f} after imports; losses "
          f"{[round(loss, 4) for loss in found['losses']]}", flush=True)
    return found


def memory_cases(folder: Path, dtype: str, tokens: int) -> list[Case]:
    """Peaks of QLoRA, LoRA and peft."""
    sides = {side: measured(side, folder, dtype, tokens) for side in ("qlora", "lora", "peft")}
    held = {side: (found["peak"] - found["before"]) / MB for side, found in sides.items()}
    whole = {side: found["peak"] / MB for side, found in sides.items()}
    bits = "16-bit" if dtype == "bf16" else "32-bit"
    near = abs(sides["qlora"]["losses"][0] / sides["peft"]["losses"][0] - 1) < 2e-2
    return [Case(f"training memory, {dtype}", "MB", held["qlora"], held["lora"], f"our {bits} LoRA", 0.55),
            Case(f"training memory, {dtype}", "MB", held["qlora"], held["peft"], "peft + bitsandbytes", 0.8,
                 equal=near),
            Case(f"whole process, {dtype}", "MB", whole["qlora"], whole["lora"], f"our {bits} LoRA", 0.55),
            Case(f"whole process, {dtype}", "MB", whole["qlora"], whole["peft"], "peft + bitsandbytes", 0.8,
                 equal=near)]


def load_cases(folder: Path, tokens: int) -> list[Case]:
    """The peak of loading, beside what is held after it and three of the largest tensor."""
    cases = []
    for dtype in ("bf16", "fp32"):
        load = measured("load", folder, dtype, tokens)
        bound = (load["final"] - load["before"] + 3 * load["largest"]) / MB
        cases.append(Case(f"peak of loading in {dtype}", "MB", (load["peak"] - load["before"]) / MB, bound,
                          "final + 3 tensors", 1.0))
        print(f"    in {load['seconds']:.1f} s; {load['final'] / MB:.0f} MB held then")
    return cases


def time_cases(folder: Path, tokens: int, repeats: int) -> list[Case]:
    """Seconds of a step of each side, in turns."""
    qlora, board = ours(folder, "fp32", "nf4", tokens, recompute=False)
    factors = {name: p.detach().clone() for name, p in board.parameters("default").items()}
    steps = {"qlora": qlora, "lora": ours(folder, "fp32", None, tokens, recompute=False)[0],
             "peft": peft_bitsandbytes(folder, "fp32", tokens, recompute=False, factors=factors)}
    times: dict[str, list[float]] = {side: [] for side in steps}
    losses: dict[str, list[float]] = {side: [] for side in steps}
    for turn in range(repeats + 1):
        for side, step in steps.items():
            began = time.perf_counter()
            losses[side].append(step())
            if turn:
                times[side].append(time.perf_counter() - began)
    middle = {side: statistics.median(found) for side, found in times.items()}
    print(f"  losses {losses}")
    near = all(abs(a / b - 1) < 1e-4 for a, b in zip(losses["qlora"], losses["peft"], strict=True))
    print(f"  seconds {times}")
    return [Case(f"step of {tokens} tokens, fp32", "s", middle["qlora"], middle["lora"], "our LoRA over fp32", 1.15),
            Case(f"step of {tokens} tokens, fp32", "s", middle["qlora"], middle["peft"], "peft + bitsandbytes", 0.8,
                 equal=near)]


def main() -> int:
    """Measure all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 layers, 128 tokens: the embedding weighs too much")
    parser.add_argument("--shape", choices=list(SHAPES), default="0.5b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default=",".join(CASES), help="of " + ",".join(CASES))
    parser.add_argument("--keep", type=Path, help="folder of models; what is there is not written again")
    parser.add_argument("--child")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--dtype", default="fp32")
    args = parser.parse_args()
    tokens = args.tokens or (128 if args.quick else 512)
    if args.child:
        child(args.child, args.folder, args.dtype, tokens)
        return 0
    shape = dict(SHAPES[args.shape])
    shape["num_hidden_layers"] = args.layers or (8 if args.quick else shape["num_hidden_layers"])
    cases: list[Case] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = (args.keep or Path(scratch)) / f"{args.shape}-{shape['num_hidden_layers']}"
        if not folder.is_dir():
            write_model(folder, shape)
        for name in args.only.split(","):
            kind, _, dtype = name.partition("-")
            cases += {"time": lambda: time_cases(folder, tokens, args.repeats), "load": lambda: load_cases(
                folder, tokens), "memory": lambda dtype=dtype: memory_cases(folder, dtype, tokens)}[kind]()
    return report("quantized", cases) and 0


if __name__ == "__main__":
    raise SystemExit(main())
