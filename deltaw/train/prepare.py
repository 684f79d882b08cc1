"""Before the first step: how steps are computed. Each choice is checked on real examples, and said in a line.

    shared inputs   q, k, v and gate, up as one product: found by watching one forward
    plain layers    adapted layers that cannot be fused (quantized, say): counted, with the reason
    gated products  made again in the backward pass: found by watching one forward
    frozen norms    keep less, in one pass: found by watching one forward
    packing         examples end to end instead of padded: taken if two examples give the loss they give apart
    compiling       taken if the run is long, and kept if a measured step is faster

A choice changes sums in their last bits only, but a resumed run has to take the same: `Choices` are written down.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from deltaw import bases
from deltaw.bases.gated import gated_modules, product_made_again
from deltaw.bases.norms import keeping_less, norm_modules
from deltaw.bases.packed_attention import attention_modules, packed_attention, takes_packed
from deltaw.bases.rotary import rotary_in_one_pass
from deltaw.core.layers import plain_layers
from deltaw.inject.blocks import repeated_layers
from deltaw.train.agreement import same_loss
from deltaw.train.compile import REPAID_AFTER, REPAID_AFTER_GPU, compiled_layers, why_not
from deltaw.train.config import TrainConfig
from deltaw.train.decoding import device_of, finish
from deltaw.train.evaluation import evaluating
from deltaw.train.examples import Examples, Layout
from deltaw.train.memory import recompute_activations, recomputed, release_at_once
from deltaw.train.objective import CausalLoss, Inputs, Objective
from deltaw.train.tuning import Attached

_WORTH = 0.97
"""A compiled step has to take less than this share of a plain one."""


@dataclass
class Choices:
    """What was chosen, and why."""

    packed: bool = False
    compiled: bool = False
    lines: list[str] = field(default_factory=list)
    """One for each choice, for people."""
    plain: dict[str, int] = field(default_factory=dict)
    """Adapted linear layers that train in plain operations instead of fused ones: how many, by reason."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"packed": self.packed, "compiled": self.compiled, "lines": self.lines, "plain": self.plain}


class Preparation:
    """Makes the choices for one run, in the order in which one rests on another."""

    def __init__(self, config: TrainConfig, base: bases.Base, examples: Examples, tuning: Attached,
                 objective: Objective, steps: int) -> None:
        self.config, self.base, self.examples, self.tuning = config, base, examples, tuning
        self.objective, self.steps = objective, steps

    @contextmanager
    def applied(self, recorded: Choices | None = None) -> Iterator[Choices]:
        """The model as it was chosen, for the length of the block; as `recorded` where a run is resumed."""
        choices = Choices()
        with ExitStack() as stack:
            with torch.random.fork_rng():  # the run draws what it would draw without the looks taken here
                self.share(choices)
                stack.enter_context(rotary_in_one_pass(self.base.model))
                recomputes = self.recompute(choices, stack)
                stack.enter_context(keeping_less(norm_modules(self.base.model, self.look)))
                if recomputes != "layer":  # a layer that is computed again keeps nothing of this
                    stack.enter_context(product_made_again(gated_modules(self.base.model, self.look)))
                choices.packed = self.pack(choices, recorded)
                if choices.packed:
                    stack.enter_context(packed_attention(self.base.model))
                if recomputes == "attention" and self.config.compile != "off":
                    choices.lines.append("compile: off, it does not go with gradient_checkpointing of attention only")
                else:
                    choices.compiled = self.compile(choices, recorded, stack)
            yield choices

    def share(self, choices: Choices) -> None:
        """Compute linear layers of one input together; say which layers, and whether the loss, cannot be fused."""
        board = self.tuning.board
        if board is not None:
            board.share_inputs(self.look)
            choices.plain = {reason: len(sites) for reason, sites in plain_layers(self.look).items()}
        if choices.plain:
            layers = ", ".join(f"{count} ({reason})" for reason, count in choices.plain.items())
            choices.lines.append(f"plain operations instead of fused ones: {layers} of the adapted linear layers")
        if isinstance(self.objective, CausalLoss) and self.objective.uses_own_logits(self.base.model):
            choices.lines.append("loss: from the model's own logits, to which it does something that is not known")

    def look(self) -> None:
        """A forward on one example, to be watched."""
        with evaluating(self.base.model):
            self.objective.loss(self.base.model, self.batch(1, packed=False))

    def recompute(self, choices: Choices, stack: ExitStack) -> str:
        """Gradient checkpointing as it was asked for, or of whole layers where attention cannot be told apart."""
        wanted, model = self.config.gradient_checkpointing, self.base.model
        if wanted != "off" and device_of(model).type == "cpu":
            release_at_once()
        if wanted == "attention" and takes_packed(model):
            with packed_attention(model), attention_modules() as found:
                self.look()
            stack.enter_context(recomputed(found))
            choices.lines.append(f"gradient checkpointing: the attention of {len(found)} layers")
            return "attention"
        if wanted == "attention":
            choices.lines.append(f"gradient checkpointing: whole layers, {type(model).__name__} does not let its "
                                 "attention be told apart")
        if wanted != "off":
            recompute_activations(model)
        return "layer" if wanted != "off" else "off"

    def pack(self, choices: Choices, recorded: Choices | None) -> bool:
        """Whether examples are laid end to end."""
        wanted, model = self.config.packing, self.base.model
        if self.config.task != "causal-lm" or wanted == "off":
            return False
        if not self.tuning.packs:
            reason = f"{self.config.method} puts tokens of its own into each row"
        elif not takes_packed(model):
            reason = f"{type(model).__name__} does not let its attention be chosen"
        elif recorded is not None and not recorded.packed:
            return False
        else:
            with packed_attention(model), evaluating(model):
                loss = self.objective.loss(model, self.batch(2, packed=True))
            with evaluating(model):
                apart = self.objective.loss(model, self.batch(2, packed=False))
            if same_loss(loss, apart, self.base.dtype):
                choices.lines.append("packing: examples lie end to end, none is padded")
                return True
            reason = f"this model's loss is then {float(loss):.6g} instead of {float(apart):.6g}"
        choices.lines.append(f"packing: off, {reason}; batches are padded")
        return False

    def compile(self, choices: Choices, recorded: Choices | None, stack: ExitStack) -> bool:
        """Whether the repeated layers are compiled; leaves them so on the stack."""
        wanted, model = self.config.compile, self.base.model
        if wanted == "off" or (recorded is not None and not recorded.compiled):
            return False
        if not self.tuning.compiles:
            choices.lines.append(f"compile: off, {self.config.method} changes more than layers")
            return False
        if not repeated_layers(model):
            choices.lines.append("compile: off, this network repeats no layer")
            return False
        if reason := why_not(device_of(model)):
            choices.lines.append(f"compile: off, {reason}")
            return False
        plain = self.timed(choices)
        least = REPAID_AFTER if device_of(model).type == "cpu" else REPAID_AFTER_GPU
        if wanted == "auto" and recorded is None and plain * self.steps < least:
            choices.lines.append(f"compile: off, {self.steps} steps of {plain:.2g} s would not repay it")
            return False
        plain = min(plain, self.timed(choices))
        own = stack.enter_context(ExitStack())
        try:
            own.enter_context(compiled_layers(model))
            spent = self.timed(choices)
            compiled = min(self.timed(choices), self.timed(choices))
        except Exception as error:  # whatever a compiler says, the run can do without it
            own.close()
            choices.lines.append(f"compile: off, it failed: {type(error).__name__}")
            return False
        if wanted == "auto" and recorded is None and compiled > _WORTH * plain:
            own.close()
            choices.lines.append(f"compile: off, a step takes {compiled:.2f} s with it and {plain:.2f} s without")
            return False
        choices.lines.append(f"compile: layer by layer in {spent:.0f} s; a step takes {compiled:.2f} s instead of "
                             f"{plain:.2f} s")
        return True

    def timed(self, choices: Choices) -> float:
        """Seconds that a forward and backward pass takes."""
        finish(device_of(self.base.model))
        began = time.perf_counter()
        self.step(choices)
        finish(device_of(self.base.model))
        return time.perf_counter() - began

    def step(self, choices: Choices) -> None:
        """Forward and backward on some examples; nothing remains of it."""
        model = self.base.model
        was_training = model.training
        model.train()
        try:
            loss = self.objective.loss(model, self.batch(self.config.batch_size, packed=choices.packed))
            loss.backward()  # type: ignore[no-untyped-call]
        finally:
            model.train(was_training)
            for parameter in model.parameters():
                parameter.grad = None

    def batch(self, count: int, *, packed: bool) -> Inputs:
        """The first examples as a batch, within the budget of tokens: the same in every session of a run."""
        chosen: list[Any] = [self.examples.train[int(row)] for row in self.examples.train_rows[:count]]
        budget, tokens = self.config.batch_tokens, 0
        for i, example in enumerate(chosen):
            tokens += len(example.input_ids)
            if budget is not None and i and tokens > budget:
                chosen = chosen[:i]
                break
        return Layout(self.base, packed=packed).batch(chosen).inputs
