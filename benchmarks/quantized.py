"""QLoRA (nf4, double quantization) beside our LoRA over 16 bits, and beside peft with bitsandbytes.

    python benchmarks/quantized.py [--quick] [--only time-fp32,time-bf16,memory-bf16,...] [--shape 0.5b|1b|7b]
                                   [--device cpu|cuda] [--rows 1 --tokens 512]

Qwen2.5-0.5B's shapes with random weights, TinyLlama-1.1B's or Llama-2-7B's; all-linear r=8, every token learned from.
`--keep FOLDER` keeps the model for the next call, so that each case can have a call of its own.

Both time and memory are shown with the embedding and the output layer in 16 bits and with them in 8
(`--quantize-tables int8`). Memory is the most that a fresh process held (VmHWM), loading included, less what it held
after its imports, the model's own module among them ("training memory"); layers are computed again in the backward pass
on all sides. QLoRA and LoRA are both computed in bf16, with 16-bit embeddings, as on hardware that has bf16
instructions.
Time is measured in fp32 on all sides, beside LoRA over fp32 weights, and in bf16 where the processor multiplies it
natively and does not emulate it. All activations are kept. Over a base in bf16 peft runs in three ways: as it comes,
under autocast, and with its factors in 16 bits.

On a GPU everything is in bf16, peft's factors too, as it is faster and smaller so; memory is the most that the GPU's
allocator had given out in a fresh process, loading included (what it held is printed beside it).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from big_model import high_water
from pairs import Case, report, timed
from shapes import LINEAR, SHAPES, batch_of, model_of

from deltaw.bases import choose_dtype

MB = 1e6
Step = Callable[[], float]
TABLES = "qlora + int8 tables"
TUNED = ExitStack()
NAMES = {"0.5b": "qwen", "1b": "llama1b", "7b": "llama7b"}
CASES = {"cpu": "time-fp32,time-bf16,memory-bf16,memory-fp32,load", "cuda": "time-bf16,memory-bf16,load"}


def write_model(folder: Path, shape: str, layers: int, device: str) -> None:
    """A model folder of this shape in bf16."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    model_of(shape, torch.bfloat16, layers, device).save_pretrained(folder, max_shard_size="500MB")
    core = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, "<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)


def ours(folder: Path, dtype: str, quantize: Any, size: tuple[int, int], device: str, *,
         recompute: bool, tables: Any = "none") -> tuple[Step, Any]:
    """A step of ours, tuned as training tunes it for as long as the process lasts, and its board."""
    import deltaw
    from deltaw.bases import load_base
    from deltaw.bases.gated import gated_modules, product_made_again
    from deltaw.bases.norms import keeping_less, norm_modules
    from deltaw.bases.packed_attention import packed_attention
    from deltaw.bases.rotary import rotary_in_one_pass
    from deltaw.train.memory import recompute_activations, release_at_once
    from deltaw.train.objective import CausalLoss
    from deltaw.train.optimizer import adamw

    model = load_base(str(folder), dtype=dtype, quantize=quantize, quantize_tables=tables,
                      device=device).model.train()
    board = deltaw.attach(model, deltaw.LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR), seed=0)
    batch, objective = batch_of(*size, device), CausalLoss()

    def look() -> None:
        objective.loss(model, {n: t[:1, :64] for n, t in batch.items()})

    board.share_inputs(look)
    for tuned in (rotary_in_one_pass(model), keeping_less(norm_modules(model, look)),
                  *([] if recompute else [product_made_again(gated_modules(model, look))]), packed_attention(model)):
        TUNED.enter_context(tuned)
    if recompute:
        recompute_activations(model)
        if device == "cpu":
            release_at_once()
    optimizer, units = adamw(board.parameters("default"), learning_rate=1e-4), objective.units(batch)

    def step() -> float:
        loss = objective.loss(model, batch) / units
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step, board


def peft_bitsandbytes(folder: Path, dtype: str, size: tuple[int, int], device: str, *, recompute: bool,
                      factors: dict[str, torch.Tensor] | None = None, side: str = "peft") -> Step:
    """The same step by transformers, peft and bitsandbytes, as it comes, under autocast or with 16-bit factors."""
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    number = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    placed = {"device_map": {"": device}} if device == "cuda" else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=number, quantization_config=BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=number), **placed)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model = peft.get_peft_model(model, peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=LINEAR, task_type="CAUSAL_LM"), autocast_adapter_dtype=side != "peft 16-bit")
    model.train()
    for name, parameter in model.named_parameters():
        if factors is not None and ".lora_A." in name:
            site = name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")
            parameter.data.copy_(factors[f"{site}.lora_A"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0,
                                  fused=True)
    batch = batch_of(*size, device)

    def step() -> float:
        with torch.autocast(device, torch.bfloat16, enabled=side == "peft autocast"):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def child(side: str, folder: Path, dtype: str, size: tuple[int, int], device: str) -> None:
    """One side in this process: what it held at most, and after its imports."""
    import bitsandbytes  # noqa: F401
    from transformers import AutoConfig, AutoModelForCausalLM

    if side.startswith("peft"):
        import peft  # noqa: F401
    AutoModelForCausalLM._model_mapping[type(AutoConfig.from_pretrained(folder))]  # imports the model's own module
    before = highest(device)["peak"]
    if side == "load":
        from deltaw.bases import load_base
        from deltaw.train.memory import memory_in_use

        seconds, base = timed(lambda: load_base(str(folder), dtype=dtype, quantize="nf4", device=device), device)
        width = 2 if dtype == "bf16" else 4
        largest = max(p.numel() * width for p in base.model.parameters() if p.is_floating_point())
        print(json.dumps(highest(device) | {"before": before, "final": memory_in_use(), "largest": largest,
                                            "seconds": seconds, "losses": []}))
        return
    if side.startswith("peft"):
        step = peft_bitsandbytes(folder, dtype, size, device, recompute=True, side=side)
    else:
        step, _ = ours(folder, dtype, None if side == "lora" else "nf4", size, device, recompute=True,
                       tables="int8" if side == TABLES else "none")
    losses = [step() for _ in range(2)]
    print(json.dumps(highest(device) | {"before": before, "losses": losses}))


def highest(device: str) -> dict[str, int]:
    """The most bytes that this process had so far, and that a GPU's allocator held for it."""
    if device == "cuda":
        return {"peak": torch.cuda.max_memory_allocated(), "held": torch.cuda.max_memory_reserved()}
    return {"peak": high_water()}


def measured(side: str, folder: Path, dtype: str, size: tuple[int, int], device: str) -> dict[str, Any]:
    """The figures of a fresh process."""
    command = [sys.executable, __file__, "--child", side, "--folder", str(folder), "--dtype", dtype, "--rows",
               str(size[0]), "--tokens", str(size[1]), "--device", device]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    held = f", {found['held'] / MB:.0f} held" if "held" in found else ""
    print(f"  {side:6} {dtype}: peak {found['peak'] / MB:6.0f} MB{held}, {found['before'] / MB:4.0f} after imports; "
          f"losses {[round(loss, 4) for loss in found['losses']]}", flush=True)
    return found


def memory_cases(folder: Path, dtype: str, size: tuple[int, int], device: str) -> list[Case]:
    """Peaks of QLoRA, LoRA and peft."""
    names = ("qlora", TABLES, "lora", *rivals(dtype, device))
    with ThreadPoolExecutor(3 if device == "cuda" else 1) as pool:  # a GPU's figure is the process's own
        found = list(pool.map(lambda side: measured(side, folder, dtype, size, device), names))
    sides = dict(zip(names, found, strict=True))
    held = {side: (found["peak"] - found["before"]) / MB for side, found in sides.items()}
    whole = {side: found["peak"] / MB for side, found in sides.items()}
    bits = "16-bit" if dtype == "bf16" else "32-bit"
    near = {side: abs(sides["qlora"]["losses"][0] / sides[side]["losses"][0] - 1) < 2e-2
            for side in rivals(dtype, device)}
    shown = {"training memory": held} | ({} if device == "cuda" else {"whole process": whole})
    agree = abs(sides[TABLES]["losses"][0] / sides["qlora"]["losses"][0] - 1) < 2e-2
    return [case for what, of in shown.items() for case in (
        Case(f"{what}, {dtype}, tables in {bits}", "MB", of["qlora"], of["lora"], f"our {bits} LoRA", 0.55),
        Case(f"{what}, {dtype}, --quantize-tables int8", "MB", of[TABLES], of["lora"], f"our {bits} LoRA", 0.55,
             equal=agree),
        *(Case(f"{what}, {dtype}", "MB", of["qlora"], of[side], f"{side} + bitsandbytes", 0.8, equal=equal)
          for side, equal in near.items()))]


def load_cases(folder: Path, size: tuple[int, int], device: str) -> list[Case]:
    """The peak of loading, beside what is held after it and three of the largest tensor."""
    cases = []
    for dtype in ("bf16",) if device == "cuda" else ("bf16", "fp32"):
        load = measured("load", folder, dtype, size, device)
        bound = (load["final"] - load["before"] + 3 * load["largest"]) / MB
        cases.append(Case(f"peak of loading in {dtype}", "MB", (load["peak"] - load["before"]) / MB, bound,
                          "final + 3 tensors", 1.0))
        print(f"    in {load['seconds']:.1f} s; {load['final'] / MB:.0f} MB held then")
    return cases


def time_cases(folder: Path, dtype: str, size: tuple[int, int], device: str, repeats: int) -> list[Case]:
    """Seconds of a step of each side, in turns, after a turn that is not counted (on a GPU three)."""
    if device == "cpu" and dtype == "bf16" and choose_dtype("auto", device)[0] != torch.bfloat16:
        print("  time-bf16: left out, this processor does not multiply bfloat16 natively")
        return []
    warm = 3 if device == "cuda" else 1
    qlora, board = ours(folder, dtype, "nf4", size, device, recompute=False)
    factors = {name: p.detach().clone() for name, p in board.parameters("default").items()}
    steps = {"qlora": qlora, "lora": ours(folder, dtype, None, size, device, recompute=False)[0],
             TABLES: ours(folder, dtype, "nf4", size, device, recompute=False, tables="int8")[0],
             **{side: peft_bitsandbytes(folder, dtype, size, device, recompute=False, factors=factors, side=side)
                for side in rivals(dtype, device)}}
    times: dict[str, list[float]] = {side: [] for side in steps}
    losses: dict[str, list[float]] = {side: [] for side in steps}
    for _ in range(repeats + warm):
        for side, step in steps.items():
            seconds, loss = timed(step, device)
            losses[side].append(loss)
            times[side].append(seconds)
    middle = {side: statistics.median(found[warm:]) for side, found in times.items()}
    print(f"  losses {losses}")
    tolerance = 1e-4 if dtype == "fp32" else 2e-2
    near = {side: all(abs(a / b - 1) < tolerance for a, b in zip(losses["qlora"], losses[side], strict=True))
            for side in rivals(dtype, device)}
    agree = all(abs(a / b - 1) < 2e-2 for a, b in zip(losses["qlora"], losses[TABLES], strict=True))
    print(f"  seconds {times}")
    what = f"step of {size[0]} x {size[1]} tokens, {dtype}"
    return [Case(what, "s", middle["qlora"], middle["lora"], f"our LoRA over {dtype}", 1.15),
            Case(f"{what}, --quantize-tables int8", "s", middle[TABLES], middle["lora"], f"our LoRA over {dtype}", 1.15,
                 equal=agree),
            *(Case(what, "s", middle["qlora"], middle[side], f"{side} + bitsandbytes", 0.8, equal=equal)
              for side, equal in near.items())]


def rivals(dtype: str, device: str) -> list[str]:
    """How peft is run: on a GPU as is quickest there."""
    if dtype == "fp32":
        return ["peft"]
    return ["peft 16-bit"] if device == "cuda" else ["peft", "peft autocast", "peft 16-bit"]


def main() -> int:
    """Measure all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 layers, 128 tokens: the embedding weighs too much")
    parser.add_argument("--shape", choices=list(NAMES), default="0.5b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--repeats", type=int, help="3, on a GPU 20")
    parser.add_argument("--only", help="of " + CASES["cpu"])
    parser.add_argument("--keep", type=Path, help="folder of models; what is there is not written again")
    parser.add_argument("--child")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--dtype", default="fp32")
    args = parser.parse_args()
    with TUNED:
        return measure(args)


def measure(args: argparse.Namespace) -> int:
    """The cases that were asked for; in a process of its own, one side."""
    size, device = (args.rows, args.tokens or (128 if args.quick else 512)), args.device
    if args.child:
        child(args.child, args.folder, args.dtype, size, device)
        return 0
    shape = NAMES[args.shape]
    layers = args.layers or (8 if args.quick else SHAPES[shape]["num_hidden_layers"])
    cases: list[Case] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = (args.keep or Path(scratch)) / f"{args.shape}-{layers}"
        if not folder.is_dir():
            print(f"  written in {timed(lambda: write_model(folder, shape, layers, device), device)[0]:.0f} s")
        for name in (args.only or CASES[device]).split(","):
            kind, _, dtype = name.partition("-")
            if kind == "time":
                repeats = args.repeats or (20 if device == "cuda" else 3)
                cases += time_cases(folder, dtype or "fp32", size, device, repeats)
            elif kind == "memory":
                cases += memory_cases(folder, dtype, size, device)
            else:
                cases += load_cases(folder, size, device)
            if device == "cuda":
                torch.cuda.empty_cache()  # the next case is measured in processes of its own
    return report("quantized", cases, device) and 0


if __name__ == "__main__":
    raise SystemExit(main())
