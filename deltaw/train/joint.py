"""One pass over the base for micro-batches of several adapters, and what tells whether a job may take part.

The micro-batches lie end to end in one packed row; each adapter changes its own tokens. The loss of each job is a sum
over its own tokens, divided by its own units, and the gradient of the sum over jobs is each job's own: no operation
mixes tokens of two examples. A loss that is not finite is left out of that sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaw.bases.packed_attention import PLACES
from deltaw.switch import Switchboard
from deltaw.train.agreement import same_loss
from deltaw.train.evaluation import evaluating
from deltaw.train.objective import CausalLoss, Inputs


@dataclass(frozen=True)
class Piece:
    """A packed micro-batch (1, T) of one adapter, its objective, and what its loss is divided by."""

    name: str | None
    inputs: Inputs
    objective: CausalLoss
    units: int
    generator: torch.Generator | None = None

    @property
    def tokens(self) -> int:
        """T."""
        return self.inputs["input_ids"].numel()


def joint_backward(board: Switchboard, pieces: Sequence[Piece]) -> list[float]:
    """Add to each adapter its gradient of its own loss, and return the losses, each divided by its units."""
    generators = {p.name: p.generator for p in pieces if p.generator is not None and p.name is not None}
    with board.route([p.name for p in pieces], lengths=[p.tokens for p in pieces], generators=generators):
        losses = [loss / piece.units for loss, piece in zip(joint_losses(board, pieces), pieces, strict=True)]
        finite = [loss for loss in losses if bool(loss.detach().isfinite()) and loss.requires_grad]
        if finite:  # the route stays until the end: recomputed layers ask for it
            torch.stack(finite).sum().backward()  # type: ignore[no-untyped-call]
    return [float(loss.detach()) for loss in losses]


def joint_losses(board: Switchboard, pieces: Sequence[Piece]) -> list[Tensor]:
    """The loss of each piece, summed over its units; within the route of these pieces."""
    stops = torch.tensor([p.tokens for p in pieces]).cumsum(0)
    parts = [(int(stop), p.objective.terms) for stop, p in zip(stops, pieces, strict=True)]
    losses_N, where = pieces[0].objective.by_token(board.model, joined([p.inputs for p in pieces]), parts)
    edges = torch.searchsorted(where, stops.to(where.device)).tolist()
    return [losses_N[start:stop].sum(dtype=torch.float64).to(losses_N.dtype)
            for start, stop in zip([0, *edges], edges, strict=False)]


def joined(batches: Sequence[Inputs]) -> dict[str, Tensor]:
    """Packed rows as one."""
    row = {name: torch.cat([batch[name] for batch in batches], 1) for name in ("input_ids", "labels", "position_ids")}
    lengths = torch.cat([batch[PLACES].diff() for batch in batches])
    places = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)
    return row | {"attention_mask": batches[0]["attention_mask"], PLACES: places}


def why_apart(board: Switchboard, probe: Piece, other: Piece, *, redraws: bool, dtype: torch.dtype) -> str:
    """Why an adapter has to have passes of its own, in a few words; "" where it may share them. Tried, not guessed.

    `probe` holds an example of the job, `other` of a neighbour. `redraws` says that dropout and recomputed activations
    meet, `dtype` in which format the base computes.
    """
    assert probe.name is not None
    targets = board.table(probe.name)
    kinds = sorted({target.site.kind for target in targets} - {"linear", "embedding"})
    if kinds:
        return f"it trains parts of the kind {', '.join(kinds)}, which see more than one token"
    if redraws:
        return "its dropout would be drawn anew where activations are recomputed"
    names, lengths = [other.name, probe.name], [other.tokens, probe.tokens]
    with evaluating(board.model):
        before = dict(board.active)
        board.use(probe.name)
        alone = probe.objective.loss(board.model, probe.inputs)
        board.use(before)
        try:
            with board.route(names, lengths=lengths):
                together = joint_losses(board, [other, probe])[1]
        except (RuntimeError, ValueError) as error:
            return f"its layers do not take packed tokens of several adapters ({str(error).splitlines()[0][:120]})"
    if not same_loss(together, alone, dtype):
        return f"its loss beside a neighbour is {float(together):.6g} instead of {float(alone):.6g}"
    return ""


def draws_in_training(board: Switchboard, inputs: Mapping[str, Tensor]) -> bool:
    """Whether the base itself draws random numbers in training, as with dropout of its own."""
    model, was_training = board.model, board.model.training
    device = inputs["input_ids"].device
    with torch.random.fork_rng(), torch.no_grad(), board.off():
        before = _state(device)
        model.train()
        try:
            model(**{name: tensor for name, tensor in inputs.items() if name != "labels"}, use_cache=False)
        finally:
            model.train(was_training)
        return not torch.equal(before, _state(device))


def _state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
