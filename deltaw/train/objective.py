"""What a training run minimises: the *sum* of the loss over a batch's supervised units, and how many units there are.

A loop that adds up micro-batches divides every sum by the units of the whole step. The mean of means, which weighs a
token by the length of its neighbours, never arises:

    loss = Σ_batches Σ_units ℓ  /  Σ_batches units

Units are supervised tokens for language models and rows for classifiers. ℓ is computed in float32 or wider.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.baselines.layout import prompt_ends
from deltaw.core.tables import PackedHead
from deltaw.errors import BaseModelError, Fault
from deltaw.train.cross_entropy import OutputLayer, as_is, token_loss, token_losses
from deltaw.train.terms import Terms

IGNORED = -100
"""The label of a position that is not learned from."""

Inputs = Mapping[str, Tensor]
"""A collated batch: `labels` beside what the model's forward takes."""


Finish = Callable[[Tensor], Tensor]
_PROBE = 8
"""Rows of the first batch on which a model's own logits are looked at."""
_FINISHES: Mapping[str, Callable[..., Tensor]] = {
    "final_logit_softcapping": lambda z, value: value * torch.tanh(z / value),  # Gemma 2
    "logit_scale": lambda z, value: z * value,  # Cohere
    "logits_scaling": lambda z, value: z / value,  # Granite
}
"""What models of transformers do to their logits, by the setting of their config that says how much."""


class Objective(Protocol):
    """A loss that is a sum over units."""

    def units(self, batch: Inputs) -> int:
        """How many supervised units the batch holds."""

    def loss(self, model: nn.Module, batch: Inputs) -> Tensor:
        """The loss summed over the batch's units; a differentiable scalar, float32 or wider."""


class CausalLoss:
    """Σ -log p(token | tokens before it) over the supervised tokens (`labels` other than -100).

    The hidden states of supervised positions are taken before the output layer, and the loss is computed from them a
    stretch at a time (`cross_entropy`): the logits of a batch never exist. How a model treats its logits after that
    layer (a scale, a cap) is found by comparing with its own on a few rows of the first batch; one that does something
    else is asked for its own logits, of supervised positions only.
    """

    def __init__(self, *, every_position: bool = False, terms: Terms | None = None) -> None:
        """`every_position` computes all logits, which an output layer needs that treats rows by their place."""
        self.every_position = every_position
        self.terms = terms if terms is not None else Terms()
        self._layers: WeakKeyDictionary[nn.Module, OutputLayer | None] = WeakKeyDictionary()

    def units(self, batch: Inputs) -> int:
        """The number of tokens that are predicted; the first of a row never is."""
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def loss(self, model: nn.Module, batch: Inputs) -> Tensor:
        """The summed cross entropy."""
        with prompt_ends(_prompt_ends(batch["labels"])):
            return self._loss(model, batch)

    def _loss(self, model: nn.Module, batch: Inputs) -> Tensor:
        if not self.every_position and not self.uses_own_logits(model):
            total = self._stretched(model, batch)
            if total is not None:
                return total
        return self.terms.loss(*self.supervised_logits(model, batch))

    def uses_own_logits(self, model: nn.Module) -> bool:
        """Whether this model was found to do something to its logits that is not known here."""
        return model in self._layers and self._layers[model] is None

    def _stretched(self, model: nn.Module, batch: Inputs) -> Tensor | None:
        """The loss from hidden states; None where this model does not let it be computed so."""
        head = _output_layer(model)
        # A weight that is computed at each use is not among the parameters.
        if not isinstance(head, nn.Module) or not isinstance(head._parameters.get("weight"), Tensor):
            self._layers[model] = None
            return None
        inputs, where, targets_N = _positions(batch)
        known = self._layers.get(model)
        # A quantized layer may not take an empty input.
        rows = _PROBE if known is None else 0 if type(head) in (nn.Linear, PackedHead) else 1
        seen: list[Tensor] = []

        def take(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            seen.append(args[0].flatten(0, -2).index_select(0, where))
            # Sliced before it is a batch: strides of a longer one make torch copy the weight of a 16-bit layer.
            return (seen[-1][:rows].detach()[None], *args[1:])

        drawn = _random_state() if known is None else None
        logits = _logits(model, inputs, head, take)
        if drawn is not None:
            finish = _finish(model, head, seen, logits)
            known = self._layers[model] = None if finish is None else OutputLayer(head, finish)
            if known is None:
                _set_random_state(drawn)  # the forward is done again, with the same dropout
        return None if known is None else token_loss(seen[0], targets_N, known, self.terms)

    def by_token(self, model: nn.Module, batch: Inputs,
                 parts: Sequence[tuple[int, Terms]] | None = None) -> tuple[Tensor, Tensor]:
        """The loss (N,) of each supervised token, and its place in the flattened batch.

        `parts` gives stretches of the flattened batch terms of their own: the place where each ends, and its terms.
        """
        if model not in self._layers and not self.every_position:
            was_training = model.training
            model.eval()  # so that nothing is drawn, from whatever generator
            try:
                with torch.no_grad():
                    self._stretched(model, batch)  # finds out what the model does to its logits
            finally:
                model.train(was_training)
        inputs, where, targets_N = _positions(batch)
        parts = parts if parts is not None else [(batch["labels"].numel(), self.terms)]
        edges = [0, *torch.searchsorted(where, torch.tensor([stop for stop, _ in parts], device=where.device)).tolist()]
        layer = self._layers.get(model)
        if layer is not None and layer.is_plain:
            seen: list[Tensor] = []

            def take(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                seen.append(args[0].flatten(0, -2).index_select(0, where))
                return (seen[-1][None, :0].detach(), *args[1:])

            _logits(model, inputs, layer.head, take)
            values_N = seen[0]

            def losses(part: slice, terms: Terms) -> Tensor:
                return token_losses(values_N[part], targets_N[part], layer, terms)
        else:
            values_N = self.supervised_logits(model, batch)[0]

            def losses(part: slice, terms: Terms) -> Tensor:
                return terms.each(values_N[part], targets_N[part])
        runs: list[tuple[slice, Terms]] = []
        for start, stop, (_, terms) in zip(edges, edges[1:], parts, strict=False):
            if runs and runs[-1][1] == terms:  # neighbours with the same terms share the products of the head
                start = runs.pop()[0].start
            runs.append((slice(start, stop), terms))
        return torch.cat([losses(part, terms) for part, terms in runs]), where

    def supervised_logits(self, model: nn.Module, batch: Inputs) -> tuple[Tensor, Tensor]:
        """Logits (N, V) at the N supervised positions in row-major order, and the tokens (N,) that follow there."""
        inputs, where, targets_N = _positions(batch)
        head = None if self.every_position else _output_layer(model)
        with prompt_ends(_prompt_ends(batch["labels"])):
            logits = _logits(model, inputs, head, lambda _, args: (
                args[0].flatten(0, -2).index_select(0, where)[None], *args[1:]))
        # A model that reads the weight of its output layer directly never runs the hook and returns all logits. The two
        # shapes cannot be confused: a row's last position is never supervised, so N < T where there is one row.
        every = logits.shape[:2] == batch["labels"].shape
        return (logits.flatten(0, 1).index_select(0, where) if every else logits[0]), targets_N


class ClassLoss:
    """Σ -log p(label | row), or Σ (output - label)² where the model has a single output."""

    def __init__(self, terms: Terms | None = None) -> None:
        self.terms = terms if terms is not None else Terms()

    def units(self, batch: Inputs) -> int:
        """The number of rows."""
        return int(batch["labels"].shape[0])

    def loss(self, model: nn.Module, batch: Inputs) -> Tensor:
        """The summed cross entropy or squared error."""
        logits_BC = self.logits(model, batch)
        if logits_BC.shape[-1] == 1:
            return F.mse_loss(_wide(logits_BC[:, 0]), _wide(batch["labels"]), reduction="sum")
        return self.terms.loss(logits_BC, batch["labels"])

    def logits(self, model: nn.Module, batch: Inputs) -> Tensor:
        """One score per class and row, (B, C)."""
        output: Any = model(**{name: tensor for name, tensor in batch.items() if name != "labels"})
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits


def objective_for(task: str, terms: Terms | None = None) -> CausalLoss | ClassLoss:
    """The objective of a task: "causal-lm" or "seq-cls"."""
    return ClassLoss(terms) if task == "seq-cls" else CausalLoss(terms=terms)


def _output_layer(model: nn.Module) -> nn.Module | None:
    """The module whose inputs are the last hidden states, as transformers' models name it; None where there is none."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise BaseModelError(Fault("the base", f"is a {type(model).__name__}", "one of transformers' language models",
                                   "For another network, write an Objective and call deltaw.train.fit"))
    head = model.get_output_embeddings()
    return head if isinstance(head, nn.Module) else None


def _positions(batch: Inputs) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """What the model's forward takes; the N supervised places in the flattened batch; the tokens that follow there."""
    next_BT = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    where = (next_BT != IGNORED).flatten().nonzero().squeeze(1)
    return {n: t for n, t in batch.items() if n != "labels"}, where, next_BT.flatten().index_select(0, where)


def _prompt_ends(labels_BT: Tensor) -> Tensor:
    """Where each row's prompt ends and what is learned begins, (B,); T where nothing is learned."""
    learned = labels_BT != IGNORED
    return torch.where(learned.any(1), learned.int().argmax(1), labels_BT.shape[1])


def _logits(model: nn.Module, inputs: Inputs, head: nn.Module | None,
            take: Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]) -> Tensor:
    """The model's logits, with the input of its output layer replaced by what `take` makes of it."""
    hook = None if head is None else head.register_forward_pre_hook(take)
    try:
        logits: Tensor = model(**inputs, use_cache=False).logits
    finally:
        if hook is not None:
            hook.remove()
    return logits


@torch.no_grad()
def _finish(model: nn.Module, head: nn.Module, seen: Sequence[Tensor], logits: Tensor) -> Finish | None:
    """What the model does to its logits after the output layer, if it is one of the known things; else None."""
    if len(seen) != 1 or not len(seen[0]) or logits.shape[:-1] != (1, min(_PROBE, len(seen[0]))):
        return None
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    known: list[Finish] = [as_is]
    for name, act in _FINISHES.items():
        value = getattr(text, name, None)
        if isinstance(value, (int, float)) and value:
            known.append(partial(act, value=float(value)))
    own, raw = _wide(logits[0]), head(seen[0][:_PROBE])
    near = 1e-5 if raw.dtype in (torch.float32, torch.float64) else 2e-2
    return next((act for act in known if raw.shape == own.shape and
                 bool(((_wide(act(raw)) - own).abs() <= near * (1 + own.abs())).all())), None)


def _random_state() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    for device, drawn in enumerate(state[1]):
        torch.cuda.set_rng_state(drawn, device)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
