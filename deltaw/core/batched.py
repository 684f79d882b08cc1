"""The grouped low-rank linear: tokens of one batch, each with its own adapter's change, over one frozen weight.

    yᵢ = x Wᵢᵀ + bᵢ,   yᵢ[S] += s·(x'[S] Aᵀ) Bᵀ     for each segment S: consecutive tokens of one adapter

The frozen product sees all tokens at once. The adapters may differ in rank, scale and dropout, and one may change
some of the projections i only. As in `kernels`, everything is one node of the autograd graph that keeps x once. Work
grows with the tokens: neighbouring segments of one length share a batched product over factors that are stacked and
padded to the largest rank among them (`stacks`), as long as little is padded; there is a pass for each of the others.
Whoever lays out the tokens puts segments of like length and rank side by side. In bfloat16, on processors that it is
for, one call of a kernel computes the changes of all (`native_low_rank`).

No product mixes tokens of two segments, in either direction: NaN in one adapter's tokens stays there.
`reference` is the same in plain operations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.core import native_linear, native_low_rank
from deltaw.core.bank import Place
from deltaw.core.frozen import Stripped, output_for, through_frozen, write_product
from deltaw.core.kernels import gradient_of_B
from deltaw.core.methods import lora
from deltaw.core.native_low_rank import Part, Segment
from deltaw.core.stacks import BankStacks, Stacks

STACKED_FROM = 2
"""Neighbouring segments of equal length from which on one batched product beats a pass for each."""
_MOST_PADDING = 2.5
"""How many times their own size stacked factors may take."""


class Frozen(NamedTuple):
    """One linear layer over x: W (O, I) in x's dtype, or packed, and b (O,) or None.

    A W of None is O outputs of the change alone.
    """

    W: Tensor | Stripped | None
    b: Tensor | None
    outputs: int


class Factors(NamedTuple):
    """One adapter's A (R, I), B (O, R) and s at one projection; `place` where they lie in a bank."""

    A: Tensor
    B: Tensor
    scale: float
    place: Place | None = None


class Group(NamedTuple):
    """A segment of the tokens and its adapter's factors at each projection; None where it has none."""

    start: int
    stop: int
    factors: Sequence[Factors | None]
    dropout: float = 0.0
    generator: torch.Generator | None = None


def grouped_linear(x: Tensor, layers: Sequence[Frozen], groups: Sequence[Group]) -> tuple[Tensor, ...]:
    """The outputs (..., O) of all projections of x (..., I), in x's dtype.

    Segments count the tokens of x in row-major order; tokens of none get the frozen product alone. Dropout is drawn for
    each segment from its own generator, once for all projections. W and b get no gradient; those of A and B come back
    in their own dtype, and only for segments with tokens. Where all of them lie in banks, they are added there.
    """
    groups = [g for g in groups if g.stop > g.start and any(f is not None for f in g.factors)]
    keep = [None if not g.dropout else torch.empty(g.stop - g.start, x.shape[-1], dtype=torch.bool, device=x.device)
            .bernoulli_(1 - g.dropout, generator=g.generator) for g in groups]
    plan = _Plan(groups, layers, x)
    # One tensor stands for all factors in banks: autograd has to be told that there is something to differentiate.
    leaves = [torch.zeros((), requires_grad=True)] if plan.places else plan.tensors
    outputs: tuple[Tensor, ...] = _GroupedLinear.apply(  # type: ignore[no-untyped-call]
        x, plan, *keep, *(layer.W if isinstance(layer.W, Tensor) else None for layer in layers),
        *(layer.b for layer in layers), *leaves)
    return outputs


def reference(x: Tensor, layers: Sequence[Frozen], groups: Sequence[Group]) -> tuple[Tensor, ...]:
    """What `grouped_linear` computes, without dropout, one plain operation after another."""
    x_TI = x.reshape(-1, x.shape[-1])
    outputs = []
    for i, layer in enumerate(layers):
        W_OI = layer.W.packed.dense(x.dtype) if isinstance(layer.W, Stripped) else layer.W
        y_TO = x_TI.new_zeros(len(x_TI), layer.outputs) if W_OI is None else F.linear(x_TI, W_OI, layer.b)
        for group in groups:
            own = group.factors[i]
            if own is not None:
                rows = torch.arange(group.start, group.stop, device=x.device)
                part = lora.add_low_rank(y_TO[rows], x_TI[rows], own.A, own.B, own.scale)
                y_TO = y_TO.index_copy(0, rows, part)
        outputs.append(y_TO.view(*x.shape[:-1], layer.outputs))
    return tuple(outputs)


class _Plan:
    """How a call is computed: its segments, and where their tensors stand in the node's list of inputs."""

    def __init__(self, groups: Sequence[Group], layers: Sequence[Frozen], x: Tensor) -> None:
        self.outputs = [layer.outputs for layer in layers]
        self.packed = [layer.W if isinstance(layer.W, Stripped) else None for layer in layers]
        self.spans = [(g.start, g.stop) for g in groups]
        self.kept = [1.0 - g.dropout for g in groups]
        self.parts = [[(i, f.scale) for i, f in enumerate(g.factors) if f is not None] for g in groups]
        factors = [[f for f in g.factors if f is not None] for g in groups]
        self.tensors = [t for own in factors for f in own for t in (f.A, f.B)]
        self.first = 2 + len(groups) + 2 * len(layers)
        """Where the factors begin among the node's inputs."""
        self.offsets = [0, *accumulate(2 * len(part) for part in self.parts)]
        """Where each segment's factors begin among `tensors`."""
        self.ranks = [(max(ranks), sum(ranks)) for ranks in ([f.A.shape[0] for f in own] for own in factors)]
        """The largest rank of each segment, and the sum over its projections."""
        places = [[f.place for f in own if f.place is not None] for own in factors]
        self.places = places if all(map(len, places)) and sum(map(len, places)) * 2 == len(self.tensors) else []
        """Where all factors lie in banks, to which their gradients go; nothing if some lie elsewhere."""
        self.segments = self._segments(groups, x)
        """All of them, where the kernel takes them; then there are no runs."""
        self.runs = [] if self.segments else list(self._runs())

    def _segments(self, groups: Sequence[Group], x: Tensor) -> list[Segment]:
        """All segments where the kernel takes them, else none."""
        if not native_low_rank.takes(x) or any(kept != 1.0 for kept in self.kept):
            return []
        segments = [Segment(g.start, g.stop, [Part(i, f.A, f.B, f.scale) for i, f in enumerate(g.factors)
                                              if f is not None]) for g in groups]
        return segments if native_low_rank.fits(x, self.outputs, segments) else []

    def _runs(self) -> Iterator[tuple[int, int]]:
        """The segments in runs that are computed at once: from the one, up to the other."""
        at, count = 0, len(self.spans)
        for first, stop in pairwise([0, *(s for s in range(1, count) if not self._is_next_row(s)), count]):
            if stop - first > 1 and self._lies_in_bank(first):
                yield from self._stretch(at, first)
                yield first, stop
                at = stop
        yield from self._stretch(at, len(self.spans))

    def _stretch(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """Runs of segments that are no neighbours in a bank, as far as little is padded."""
        start = first
        for s in range(first + 1, stop):
            if not (self._continues(s) and self._padding(start, s + 1) <= _MOST_PADDING):
                yield from self._run(start, s)
                start = s
        if stop > first:
            yield from self._run(start, stop)

    def _is_next_row(self, s: int) -> bool:
        """Whether a segment's adapter lies in the row after that of the segment before it, which is as long."""
        if not self.places or not self._continues(s):
            return False
        (one, *_), (other, *_) = self.places[s - 1:s + 1]
        return one.bank is other.bank and one.row + 1 == other.row

    def _lies_in_bank(self, first: int) -> bool:
        """Whether a run of several segments that begins here is taken from its bank as it lies there."""
        return self._is_next_row(first + 1) and BankStacks.fits(self.places[first])

    def _continues(self, s: int) -> bool:
        """Whether a segment lies right after the one before it, is as long, and neither draws dropout."""
        (start, middle), (begin, stop) = self.spans[s - 1:s + 1]
        return middle == begin and middle - start == stop - begin and self.kept[s - 1] == self.kept[s] == 1.0

    def _padding(self, first: int, stop: int) -> float:
        """How many times their own size the stacked factors of a run take."""
        ranks = self.ranks[first:stop]
        return max(widest for widest, _ in ranks) * len(ranks) * len(self.outputs) / sum(total for _, total in ranks)

    def _run(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """One run, or each of its segments by itself where they are too few."""
        step = stop - first if stop - first >= STACKED_FROM else 1
        return ((s, s + step) for s in range(first, stop, step))

    def of_run(self, first: int, stop: int, tensors: Sequence[Any]) -> tuple[slice, Sequence[Any]]:
        """The tokens of a run, and its factors."""
        return (slice(self.spans[first][0], self.spans[stop - 1][1]),
                tensors[self.offsets[first]:self.offsets[stop]])

    def stacks(self, first: int, stop: int, factors: Sequence[Tensor], dtype: torch.dtype) -> Stacks:
        """The factors of a run of several segments."""
        if self._lies_in_bank(first):
            return BankStacks(self.places[first:stop], self.parts[first:stop], dtype)
        return Stacks(self.parts[first:stop], self.outputs, factors, dtype)

    def place(self, first: int, stop: int, found: Sequence[Tensor | None]) -> None:
        """Add the gradients of a run where its factors lie."""
        places = [place for part in self.places[first:stop] for place in part]
        for place, dA, dB in zip(places, found[0::2], found[1::2], strict=False):
            place.add(dA, dB)


class _GroupedLinear(torch.autograd.Function):
    """The node. Tensors arrive as dropout masks, all W, all b, then A, B of each segment's projections."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: _Plan, *flat: Tensor | None) -> tuple[Tensor, ...]:
        keep, W, b, factors = _parts(plan, flat)
        x_TI = x.reshape(-1, x.shape[-1])
        made = [output_for(x, outputs) for outputs in plan.outputs]
        y = [y_TO for _, y_TO in made]
        if plan.segments:
            H = [native_linear.outputs(x_TI, y, W, b, native_low_rank.packed(plan.segments))]
        else:
            H = []
            for y_TO, W_OI, bias in zip(y, W, b, strict=True):
                write_product(x_TI, W_OI, bias, y_TO)
        ctx.stacks = {}  # made once, and there until the backward pass: as large as the adapters of this pass
        for first, stop in plan.runs:
            rows, own = plan.of_run(first, stop, factors)
            if stop - first > 1:
                ctx.stacks[first] = plan.stacks(first, stop, own, x.dtype)
                H.append(ctx.stacks[first].forward(x_TI[rows], [y_TO[rows] for y_TO in y]))
                continue
            A, B = _factors(own, x.dtype)
            H.append(_dropped(x_TI[rows], keep[first], plan.kept[first]) @ _cat(A).t())
            for (i, scale), h, B_OR in zip(plan.parts[first], _split(H[-1], A), B, strict=True):
                y[i][rows].addmm_(h, B_OR.t(), alpha=scale)
        ctx.plan, ctx.count = plan, len(H)
        ctx.save_for_backward(x, *H, *flat)
        ctx.set_materialize_grads(False)
        return tuple(output for output, _ in made)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        nothing: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if all(grad is None for grad in grads):
            return tuple(nothing)
        x, *saved = ctx.saved_tensors
        H, (keep, W, _, factors) = saved[:ctx.count], _parts(plan, saved[ctx.count:])
        x_TI = x.reshape(-1, x.shape[-1])
        g = [None if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in grads]
        found: list[Tensor | None] = []
        if plan.segments:
            dx_TI, found = native_linear.gradients(x_TI, H[0], g, W, plan.segments, [
                place for part in plan.places for place in part], of_x=ctx.needs_input_grad[0])
        else:
            dx_TI = through_frozen(g, W, x_TI) if ctx.needs_input_grad[0] else None
        for (first, stop), h in zip(plan.runs, [] if plan.segments else H, strict=True):
            rows, own = plan.of_run(first, stop, factors)
            of_run = x_TI[rows], h, [None if g_TO is None else g_TO[rows] for g_TO in g], \
                None if dx_TI is None else dx_TI[rows]
            if stop - first > 1:  # let go of at once; a second backward pass makes them again
                stacks = ctx.stacks.pop(first, None) or plan.stacks(first, stop, own, x.dtype)
                of_factors = stacks.backward(*of_run)
            else:
                A, B = _factors(own, x.dtype)
                of_factors = _one_segment(*of_run, A, B, plan.parts[first], keep[first], plan.kept[first])
            if plan.places:
                plan.place(first, stop, of_factors)
            else:
                found += of_factors
        wanted = ctx.needs_input_grad[plan.first:]
        if not plan.places:
            nothing[plan.first:] = [None if grad is None or not want else grad.to(factor.dtype)
                                    for grad, want, factor in zip(found, wanted, factors, strict=True)]
        nothing[0] = None if dx_TI is None else dx_TI.view(x.shape)
        return tuple(nothing)


def _one_segment(x_SI: Tensor, h_SR: Tensor, g: Sequence[Tensor | None], dx_SI: Tensor | None, A: Sequence[Tensor],
                 B: Sequence[Tensor], part: Sequence[tuple[int, float]], keep: Tensor | None,
                 kept: float) -> list[Tensor | None]:
    """dA and dB of a segment's projections in turn; what reaches x is added to `dx_SI`."""
    dh_SR, A_RI = torch.empty_like(h_SR), _cat(A)
    for (i, scale), dh, B_OR in zip(part, _split(dh_SR, A), B, strict=True):
        g_SO = g[i]
        if g_SO is None:
            dh.zero_()
        else:
            torch.addmm(dh, g_SO, B_OR, beta=0, alpha=scale, out=dh)
    if dx_SI is not None and keep is None:
        dx_SI.addmm_(dh_SR, A_RI)
    elif dx_SI is not None:
        dx_SI += _dropped(dh_SR @ A_RI, keep, kept)
    x_SI = _dropped(x_SI, keep, kept)
    grads: list[Tensor | None] = []
    for (i, scale), dA, h in zip(part, torch.split(dh_SR.t() @ x_SI, [len(a) for a in A]), _split(h_SR, A),
                                 strict=True):
        g_SO = g[i]
        grads += (None, None) if g_SO is None else (dA, gradient_of_B(g_SO, h).mul_(scale))
    return grads


def _factors(own: Sequence[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """A and B of each of a segment's projections, in one dtype."""
    factors = [factor.to(dtype) for factor in own]
    return factors[0::2], factors[1::2]


def _parts(plan: _Plan, flat: Sequence[Tensor | None]) -> tuple[Any, Any, Any, Any]:
    """Masks, all W, all b and the factors, from the node's list."""
    groups, layers = len(plan.spans), len(plan.outputs)
    edges = (0, *accumulate((groups, layers, layers)), len(flat))
    masks, plain, b, leaves = (flat[a:z] for a, z in pairwise(edges))
    W = [W_OI if packed is None else packed for W_OI, packed in zip(plain, plan.packed, strict=True)]
    return masks, W, b, plan.tensors if plan.places else leaves


def _cat(A: Sequence[Tensor]) -> Tensor:
    return A[0] if len(A) == 1 else torch.cat(list(A))


def _split(h_SR: Tensor, A: Sequence[Tensor]) -> Sequence[Tensor]:
    """The columns of each projection."""
    return (h_SR,) if len(A) == 1 else torch.split(h_SR, [len(A_RI) for A_RI in A], 1)


def _dropped(x_SI: Tensor, keep: Tensor | None, kept: float) -> Tensor:
    """x where `keep` is true, divided by the share that is kept."""
    return x_SI if keep is None else (x_SI * keep).div_(kept)
