"""What a training run minimises: the *sum* of the loss over a batch's supervised units, and how many units there are.

A loop that adds up micro-batches divides every sum by the units of the whole step. The mean of means, which weighs a
token by the length of its neighbours, never arises:

    loss = Σ_batches Σ_units ℓ  /  Σ_batches units

Units are supervised tokens for language models and rows for classifiers. ℓ is computed in float32 or wider.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.errors import BaseModelError, Fault

IGNORED = -100
"""The label of a position that is not learned from."""

Inputs = Mapping[str, Tensor]
"""A collated batch: `labels` beside what the model's forward takes."""


class Objective(Protocol):
    """A loss that is a sum over units."""

    def units(self, batch: Inputs) -> int:
        """How many supervised units the batch holds."""

    def loss(self, model: nn.Module, batch: Inputs) -> Tensor:
        """The loss summed over the batch's units; a differentiable scalar, float32 or wider."""


class CausalLoss:
    """Σ -log p(token | tokens before it) over the supervised tokens (`labels` other than -100).

    The logits are computed for supervised positions only: with short answers to long prompts that saves most of the
    output layer's time, and the memory of (batch, length, vocabulary). Values are those of the full logits.
    """

    def __init__(self, *, every_position: bool = False) -> None:
        """`every_position` computes all logits, which an output layer needs that treats rows by their place."""
        self.every_position = every_position

    def units(self, batch: Inputs) -> int:
        """The number of tokens that are predicted; the first of a row never is."""
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def loss(self, model: nn.Module, batch: Inputs) -> Tensor:
        """The summed cross entropy."""
        logits_NV, targets_N = self.supervised_logits(model, batch)
        return F.cross_entropy(_wide(logits_NV), targets_N, reduction="sum")

    def supervised_logits(self, model: nn.Module, batch: Inputs) -> tuple[Tensor, Tensor]:
        """Logits (N, V) at the N supervised positions in row-major order, and the tokens (N,) that follow there."""
        labels_BT = batch["labels"]
        next_BT = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)
        supervised_BT = next_BT != IGNORED
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        head = None if self.every_position else _output_layer(model)
        if head is None:
            logits = model(**inputs, use_cache=False).logits
        else:
            hook = head.register_forward_pre_hook(lambda _, args: (args[0][supervised_BT][None], *args[1:]))
            try:
                logits = model(**inputs, use_cache=False).logits
            finally:
                hook.remove()
        # A model that reads the weight of its output layer directly never runs the hook and returns all logits. The two
        # shapes cannot be confused: a row's last position is never supervised, so N < T where there is one row.
        logits_NV = logits[supervised_BT] if logits.shape[:2] == labels_BT.shape else logits[0]
        return logits_NV, next_BT[supervised_BT]


class ClassLoss:
    """Σ -log p(label | row), or Σ (output - label)² where the model has a single output."""

    def units(self, batch: Inputs) -> int:
        """The number of rows."""
        return int(batch["labels"].shape[0])

    def loss(self, model: nn.Module, batch: Inputs) -> Tensor:
        """The summed cross entropy or squared error."""
        logits_BC = self.logits(model, batch)
        if logits_BC.shape[-1] == 1:
            return F.mse_loss(_wide(logits_BC[:, 0]), _wide(batch["labels"]), reduction="sum")
        return F.cross_entropy(_wide(logits_BC), batch["labels"], reduction="sum")

    def logits(self, model: nn.Module, batch: Inputs) -> Tensor:
        """One score per class and row, (B, C)."""
        output: Any = model(**{name: tensor for name, tensor in batch.items() if name != "labels"})
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits


def objective_for(task: str) -> CausalLoss | ClassLoss:
    """The objective of a task: "causal-lm" or "seq-cls"."""
    return ClassLoss() if task == "seq-cls" else CausalLoss()


def _output_layer(model: nn.Module) -> nn.Module | None:
    """The module whose inputs are the last hidden states, as transformers' models name it; None where there is none."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise BaseModelError(Fault("the base", f"is a {type(model).__name__}", "one of transformers' language models",
                                   "For another network, write an Objective and call deltaw.train.fit"))
    head = model.get_output_embeddings()
    return head if isinstance(head, nn.Module) else None


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
