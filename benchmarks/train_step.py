"""One training step: ours beside peft, full fine-tuning and the floor, on the same batch.

    python benchmarks/train_step.py [--quick] [--shape smollm2|qwen|bert|llama1b|llama7b] [--dtype auto|fp32|bf16]
                                    [--layers 30] [--qv] [--device cpu|cuda] [--rows 4,16 --tokens 256,512]
                                    [--sides A,B]

Every token is learned from, so nothing is gained by leaving logits out. The floor is a forward and backward pass
through the frozen model in plain operations. peft runs with its best settings: fused AdamW, its layers compiled, and
over a 16-bit base in three ways: as it comes ("peft"), with float32 factors whose every input it converts; under
autocast, as trainers run it ("peft autocast"); and with factors in 16 bits ("peft 16-bit"). All sides start from the
same factors, and those that freeze the base share its memory; their losses over the steps must agree. Full fine-
tuning of the 7B shape takes the memory of four models, and runs only if it is named.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from pairs import Case, gemm_rate, report, timed
from shapes import LINEAR, SHAPES, batch_of, model_of
from where import add_options

import deltaw
from deltaw.bases import choose_dtype
from deltaw.bases.gated import gated_modules, product_made_again
from deltaw.bases.norms import keeping_less, norm_modules
from deltaw.bases.packed_attention import packed_attention
from deltaw.bases.rotary import rotary_in_one_pass
from deltaw.train.compile import compiled_layers
from deltaw.train.objective import CausalLoss, ClassLoss
from deltaw.train.optimizer import adamw
from deltaw.train.terms import Terms

RIVALS = ["peft", "peft autocast", "peft 16-bit"]
"""All but the first over a 16-bit base only."""
BERT = ["query", "key", "value", "dense"]
Step = Callable[[], float]


class Sides:
    """The step of each side, as a function that returns its loss."""

    def __init__(self, base: torch.nn.Module, batch: dict[str, torch.Tensor], targets: list[str], classes: bool,
                 stack: ExitStack) -> None:
        self.base, self.targets, self.stack = base, targets, stack
        self.objective = ClassLoss(Terms()) if classes else CausalLoss()
        self.task = None if classes else "CAUSAL_LM"
        self.take(batch)

    def take(self, batch: dict[str, torch.Tensor]) -> None:
        """Let all sides go on with this batch."""
        self.batch, self.units = batch, self.objective.units(batch)

    def model(self) -> torch.nn.Module:
        """The network over the weights that all sides share, which none of them changes."""
        return copy.deepcopy(self.base, {id(p): p for p in self.base.parameters()}).requires_grad_(False)

    def named(self, name: str) -> Step:
        """The step of "ours" or of one of RIVALS (each also ", compiled"), of "full" or "floor"."""
        side, _, how = name.partition(", ")
        if side in ("full", "floor"):
            return self.full() if side == "full" else self.floor()
        if side == "ours":
            return self.ours(compiled=bool(how))
        return self.peft(side, compiled=bool(how))

    def ours(self, *, compiled: bool) -> Step:
        model = self.model()
        board = deltaw.attach(model, deltaw.LoraConfig(r=8, lora_alpha=16, target_modules=self.targets), seed=0)

        def look() -> None:
            self.objective.loss(model, {n: t[:1] for n, t in self.batch.items()})

        board.share_inputs(look)
        self.stack.enter_context(rotary_in_one_pass(model))
        self.stack.enter_context(keeping_less(norm_modules(model, look)))
        self.stack.enter_context(product_made_again(gated_modules(model, look)))
        if self.task is not None:
            self.stack.enter_context(packed_attention(model))
        parameters = board.parameters("default")
        self.factors = {name: p.detach().clone() for name, p in parameters.items()}
        optimizer = adamw(parameters, learning_rate=1e-4)
        if compiled:
            self.stack.enter_context(compiled_layers(model))

        def step() -> float:
            loss = self.objective.loss(model, self.batch) / self.units
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.item()

        return step

    def peft(self, side: str, *, compiled: bool) -> Step:
        import peft

        model = peft.get_peft_model(self.model(), peft.LoraConfig(
            r=8, lora_alpha=16, target_modules=self.targets, task_type=self.task),
            autocast_adapter_dtype=side != "peft 16-bit")
        with torch.no_grad():
            for name, module in model.train().named_modules():
                if hasattr(module, "lora_A") and len(module.lora_A):
                    site = name.removeprefix("base_model.model.")
                    module.lora_A["default"].weight.copy_(self.factors[f"{site}.lora_A"])
        if compiled:
            self.stack.enter_context(compiled_layers(model))
        return self._plain(model, autocast=side == "peft autocast")

    def full(self) -> Step:
        return self._plain(copy.deepcopy(self.base).requires_grad_())

    def _plain(self, model: torch.nn.Module, *, autocast: bool = False) -> Step:
        device = self.batch["input_ids"].device.type
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0,
                                      fused=True)

        def step() -> float:
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                loss = model(**self.batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.item()

        return step

    def floor(self) -> Step:
        model = self.model()
        model.get_input_embeddings().register_forward_hook(lambda _, args, out: out.requires_grad_())

        def step() -> float:
            loss = model(**self.batch).loss
            loss.backward()
            return loss.item()

        return step


def flops(model: torch.nn.Module, tokens: int) -> float:
    """Multiplications and additions of a forward and backward pass through frozen matrices: 4 for each weight."""
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    return 4.0 * matrices * tokens


def main() -> int:
    """Time all sides, alternating."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 layers and no compiled sides")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2")
    parser.add_argument("--qv", action="store_true", help="adapt q and v only")
    add_options(parser, dtype="auto")
    parser.add_argument("--rows", help="4, of the classifier 16; or of several batches, one after another: 4,16")
    parser.add_argument("--tokens", help="in a row of each batch: 256, of the classifier 64")
    parser.add_argument("--sides", help="some of them, by their names in the table; ours is always there")
    parser.add_argument("--repeats", type=int, help="5, on a GPU 30")
    parser.add_argument("--vs", default="peft", choices=["peft"])
    args = parser.parse_args()
    dtype, reason = choose_dtype(args.dtype, args.device)
    print(f"{str(dtype)[6:]}: {reason}")
    classes, gpu = args.shape == "bert", args.device == "cuda"
    sizes = [[int(n) for n in given.split(",")] for given in (
        args.rows or ("16" if classes else "4"), args.tokens or ("64" if classes else "256"))]
    batches = [batch_of(rows, tokens, args.device, classes=3 if classes else 0)
               for rows, tokens in zip(*sizes, strict=True)]
    targets = BERT if classes else LINEAR
    targets = [t for t in targets if t in ("q_proj", "v_proj", "query", "value")] if args.qv else targets
    base = model_of(args.shape, dtype, args.layers or (4 if args.quick else None), args.device)
    names = chosen_sides(args, rivals=RIVALS[:1] if dtype == torch.float32 else RIVALS)
    cases, peak = [], gemm_rate(dtype, args.device)
    with ExitStack() as stack:
        sides = Sides(base, batches[0], targets, classes, stack)
        steps = {name: sides.named(name) for name in names}
        # A layer of each compiled side is an entry in one table; too small a one leaves the last sides uncompiled.
        stack.enter_context(torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=4096))
        for batch in batches:
            sides.take(batch)
            t, losses = in_turns(steps, args.device, args.repeats or (30 if gpu else 5))
            size = " x ".join(map(str, batch["input_ids"].shape))
            print_shares(size, t, losses, flops(base, batch["input_ids"].numel()), peak)
            label = f"{args.shape}, {'q,v' if args.qv else 'all-linear'}, {str(dtype)[6:]}, {size}"
            cases += cases_of(label, t, losses, dtype, qv=args.qv)
    return report("train_step", cases, args.device) and 0


def print_shares(size: str, t: dict[str, float], losses: dict[str, list[float]], work: float, peak: float) -> None:
    """Each side's time beside the floor and beside what the device multiplies at most."""
    for name, value in t.items():
        of_floor = f"{value / t['floor']:.2f} of the floor  " if "floor" in t else ""
        print(f"  {size}  {name:21} {value:8.4f} s  {of_floor}{work / value / peak:5.1%} of GEMM peak "
              f"({peak / 1e9:.0f} GFLOP/s)  losses {losses[name][0]:.5f} .. {losses[name][-1]:.5f}")


def chosen_sides(args: argparse.Namespace, rivals: list[str]) -> list[str]:
    """The sides to run, ours first since the others take its factors; says which are left out."""
    compiled = [] if args.quick else [f"{side}, compiled" for side in ("ours", *rivals)]
    every = ["ours", *rivals, "full", "floor", *compiled]
    wanted = args.sides.replace(", compiled", "+compiled").split(",") if args.sides else \
        [side for side in every if not (side == "full" and args.shape == "llama7b")]
    wanted = [side.strip().replace("+compiled", ", compiled") for side in wanted]
    unknown = [side for side in wanted if side not in every]
    if unknown:
        raise SystemExit(f"no side {', '.join(map(repr, unknown))} here; there are {'; '.join(every)}")
    chosen = [side for side in every if side in ("ours", *wanted)]
    if len(chosen) < len(every):
        print("left out: " + "; ".join(side for side in every if side not in chosen))
    return chosen


def in_turns(steps: dict[str, Step], device: str, repeats: int) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Median seconds of each side, A B A B, and its losses.

    The first turn, which compiles, is not counted. On a GPU a turn is several steps: the compiler's table finds the
    layers of the side that ran last first, and in a training run that is always the same side.
    """
    losses: dict[str, list[float]] = {name: [] for name in steps}
    times: dict[str, list[float]] = {name: [] for name in steps}
    length = 5 if device == "cuda" else 1
    for turn in range(1 + -(-repeats // length)):
        for name, step in steps.items():
            for _ in range(length):
                seconds, loss = timed(step, device)
                losses[name].append(loss)
                times[name].append(seconds)
        print(f"  turn {turn}: " + ", ".join(f"{name} {times[name][-1]:.4f} s" for name in steps), flush=True)
    return {name: statistics.median(values[length:]) for name, values in times.items()}, losses


def cases_of(label: str, t: dict[str, float], losses: dict[str, list[float]], dtype: torch.dtype, *,
             qv: bool) -> list[Case]:
    """Ours beside each rival that ran: not compiled, compiled, and both compiled."""
    near, fp32 = 1e-4 if dtype == torch.float32 else 2e-2, dtype == torch.float32

    def case(what: str, ours: str, rival: str, goal: float) -> Case:
        same = rival == "full" or all(abs(x - y) <= near * abs(y)
                                      for x, y in zip(losses[ours], losses[rival], strict=True))
        return Case(f"{label}: {what}", "s", t[ours], t[rival], rival, goal, equal=same)

    eager_goal, goal = 0.75 if qv else 0.90 if fp32 else 0.85, 0.75 if qv else 0.90 if fp32 else 0.70
    cases = []
    for rival in (*RIVALS, "full"):
        least, least_compiled = (0.70, 0.70) if rival == "full" else (eager_goal, goal)
        if rival in t:
            cases.append(case(f"step / {rival}", "ours", rival, least))
        if rival in t and "ours, compiled" in t:
            cases.append(case(f"compiled / {rival}", "ours, compiled", rival, least_compiled))
        if f"{rival}, compiled" in t and "ours, compiled" in t:
            cases.append(case(f"compiled / {rival} compiled", "ours, compiled", f"{rival}, compiled", 1.0))
    return cases


if __name__ == "__main__":
    raise SystemExit(main())
