"""One training step on a network without values: what it keeps, what it adds on top, and what it computes.

Tuned as `deltaw train` tunes: inputs of q, k and v shared, gated products made again, frozen norms that keep less,
examples laid end to end where the base lets it, gradient checkpointing as asked for, logits of supervised tokens only,
in stretches (their buffers are added by `memory`, since they do not depend on the network). Two short networks are run,
and what one layer more costs is taken for all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deltaw.bases.gated import gated_modules, product_made_again
from deltaw.bases.norms import keeping_less, norm_modules
from deltaw.bases.packed_attention import PLACES, attention_modules, packed_attention, takes_packed
from deltaw.bases.quiet import quiet_transformers
from deltaw.bases.rotary import rotary_in_one_pass
from deltaw.core.followed import followed
from deltaw.errors import BaseModelError, Fault
from deltaw.inject import factors_as_drawn
from deltaw.plan.config import Method, PlanConfig
from deltaw.plan.counts import biases, with_task
from deltaw.plan.found import Point, Step, Work
from deltaw.plan.shapes import Shapes
from deltaw.plan.tape import Tape, as_on_cpu, tensors_of
from deltaw.switch import attach

ROOM = 1
"""Tokens of the look that finds which layers share their input."""


class Heard(NamedTuple):
    """A step, and the bytes that were alive after each tensor that came: their highest is the step's."""

    step: Step
    over: Sequence[int]
    """In the backward pass, on top of what is kept."""
    forward: Sequence[int]
    """In a forward pass that keeps nothing."""


class Steps:
    """Steps of one base under one config: in torch's operations, or the work of one on the `kernels` of bfloat16."""

    def __init__(self, shapes: Shapes, config: PlanConfig, dtype: torch.dtype, *, kernels: bool = False) -> None:
        self.shapes, self.config, self.dtype, self.kernels = shapes, config, dtype, kernels

    def at(self, method: Method, batch: int, length: int, rank: int | None = None) -> Step:
        """A step of this many examples of this length, of the whole network."""
        return self.heard(Point.of(method, batch, length, rank or self.config.lora.r)).step

    def heard(self, point: Point) -> Heard:
        """The same with all that was heard of the longest network that was run."""
        layers, period = self.shapes.layers, self.shapes.period
        if layers <= 2 * period:
            return self._run(point, layers)
        short, longer = self._run(point, period), self._run(point, 2 * period)
        return longer._replace(step=longer.step.grown(short.step, (layers - 2 * period) / period))

    def _run(self, point: Point, layers: int) -> Heard:
        model = self.shapes.skeleton(self.config.task, self.dtype, layers)
        try:
            with quiet_transformers(), torch.random.fork_rng(devices=[]), as_on_cpu():
                config = replace(self.config, lora=replace(self.config.lora, r=point.rank, layers_to_transform=None))
                step, over = _step(model, config, point, kernels=self.kernels)
                if self.kernels:  # what they hold is rounded up to their vectors: memory is asked of plain operations
                    return Heard(replace(step, kept=0.0, forward_work=Work()), [0], [0])
                forward = _forward_alone(model, config, point)
                return Heard(replace(step, over=max(over), forward=float(max(forward))), over, forward)
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            raise BaseModelError(Fault(
                f"base '{self.shapes.source}'", f"a step of it cannot be followed without data "
                f"({type(error).__name__}: {str(error).splitlines()[0][:120]})",
                "a network whose forward does not depend on its values",
                "Its parameters can be counted all the same: see `parameters` of the plan")) from error


def _step(model: Any, config: PlanConfig, point: Point, *, kernels: bool) -> tuple[Step, list[int]]:
    """Run a step of a whole small network, but for its peaks; and what the backward pass has alive on top."""
    tune(model, config, point.method)
    for parameter in model.parameters():  # gradients are known without being heard: here each goes as it comes
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_let_go)
    packed = config.packing == "auto" and config.task == "causal-lm" and takes_packed(model)
    inputs = example_inputs(point.batch, point.length, packed=packed)
    known = [*tensors_of(model), *inputs.values()]
    with ExitStack() as stack:
        _what_is_made_again(model, config, stack)
        if packed:
            stack.enter_context(packed_attention(model))
        tape = stack.enter_context(Tape(known))
        if kernels:
            stack.enter_context(followed(tape))
            stack.enter_context(rotary_in_one_pass(model))
        out = _forward(model, config, inputs, point)
        kept, forward_work = tape.now, tape.total()
        tape.restart()
        if out.requires_grad:
            torch.autograd.backward([out], [torch.empty_like(out)])
        over = [height - kept for height in tape.heights]
        work = tape.total()
    del out
    return Step(kept=kept, over=0.0, forward=0.0, work=work, forward_work=forward_work), over


def _let_go(parameter: Tensor) -> None:
    parameter.grad = None


def _forward_alone(model: Any, config: PlanConfig, point: Point) -> list[int]:
    """What a forward has alive that keeps nothing: an evaluation, padded and not laid end to end."""
    inputs = example_inputs(point.batch, point.length, packed=False)
    model.eval()
    with torch.no_grad(), Tape([*tensors_of(model), *inputs.values()]) as tape:
        _forward(model, config, inputs, point)
    return list(tape.heights)


def tune(model: Any, config: PlanConfig, method: Method) -> None:
    """Make the network's trainable parts those of the method; inputs of several layers are shared as in training."""
    if method == "lora":
        board = attach(model, with_task(config.lora, config.task), name="plan")
        for name in factors_as_drawn(board.table("plan")) if config.freeze_a else ():
            board.parameters("plan")[name].requires_grad_(False)
        look = example_inputs(1, ROOM + 1, packed=False)
        with Tape():
            board.share_inputs(lambda: model(**look, use_cache=False) if config.task == "causal-lm" else model(**look))
    elif method == "full":
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
    elif method == "bitfit":
        for tensor in biases(model):
            tensor.requires_grad_(True)
    else:  # what is trained stands at the input, or so near to it that gradients pass through every layer
        model.get_input_embeddings().register_forward_hook(lambda _, __, out: out.requires_grad_())


def example_inputs(batch: int, length: int, *, packed: bool) -> dict[str, Tensor]:
    """A batch without values, as `data.pack` or `data.collate` makes it."""
    with torch.device("meta"):
        if not packed:
            ids = torch.zeros(batch, length, dtype=torch.long)
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        ids = torch.zeros(1, batch * length, dtype=torch.long)
        inputs = {"input_ids": ids, "position_ids": torch.zeros_like(ids), "attention_mask": torch.zeros(1, 1, 1, 1)}
    places = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device="cpu")
    return inputs | {PLACES: places}


def _forward(model: Any, config: PlanConfig, inputs: dict[str, Tensor], point: Point) -> Tensor:
    """The hidden states of supervised tokens, before the output layer; a classifier's logits."""
    if config.task != "causal-lm":
        logits: Tensor = model(**inputs).logits
        return logits
    rows = config.supervised_tokens(point.batch, point.length)
    seen: list[Tensor] = []

    def take(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        where = torch.zeros(rows, dtype=torch.long, device="meta")
        seen.append(args[0].flatten(0, -2).index_select(0, where))
        return (seen[-1][None, :0].detach(), *args[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(take)
    try:
        model(**inputs, use_cache=False)
    finally:
        hook.remove()
    return seen[0]


def _what_is_made_again(model: Any, config: PlanConfig, stack: ExitStack) -> None:
    """Gradient checkpointing, frozen norms and gated products, as training has them."""
    wanted = config.gradient_checkpointing
    inputs = example_inputs(1, ROOM + 1, packed=False)
    options: dict[str, Any] = {"use_cache": False} if config.task == "causal-lm" else {}
    with Tape():
        norms = norm_modules(model, lambda: model(**inputs, **options))
    stack.enter_context(keeping_less(norms))
    if wanted == "attention" and takes_packed(model):
        with packed_attention(model), attention_modules() as found, torch.no_grad(), Tape():
            model(**inputs, **options)
        stack.enter_context(_recomputed(found))
    elif wanted != "off":
        enable: Callable[[dict[str, Any]], object] = getattr(
            model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
        return
    with Tape():
        gated = gated_modules(model, lambda: model(**inputs, **options))
    stack.enter_context(product_made_again(gated))


@contextmanager
def _recomputed(modules: list[nn.Module]) -> Iterator[None]:
    """These modules with their insides computed again in the backward pass."""

    def again(forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)

    for module in modules:
        module.forward = again(module.forward)
    yield
