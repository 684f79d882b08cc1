"""The grouped low-rank linear: tokens of one batch, each with its own adapter's change, over one frozen weight.

    yᵢ = x Wᵢᵀ + bᵢ,   yᵢ[S] += s·(x'[S] Aᵀ) Bᵀ     for each segment S: consecutive tokens of one adapter

The frozen product sees all tokens at once. The adapters may differ in rank, scale and dropout, and one may change
some of the projections i only. As in `kernels`, everything is one node of the autograd graph that keeps x once. Work
grows with the tokens: there is a pass for each segment, or, where all are equally long, one batched product over
factors stacked and padded to the largest rank.

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

from deltaw.core.kernels import Stripped, product
from deltaw.core.methods import lora

STACKED_FROM = 12
"""Segments of equal length from which on one batched product beats a pass for each."""
_MOST_PADDING = 4.0
"""How many times their own size stacked factors may take."""


class Frozen(NamedTuple):
    """One linear layer over x: W (O, I) in x's dtype, or packed, and b (O,) or None.

    A W of None is O outputs of the change alone.
    """

    W: Tensor | Stripped | None
    b: Tensor | None
    outputs: int


class Factors(NamedTuple):
    """One adapter's A (R, I), B (O, R) and s at one projection."""

    A: Tensor
    B: Tensor
    scale: float


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
    in their own dtype, and only for segments with tokens.
    """
    groups = [g for g in groups if g.stop > g.start and any(f is not None for f in g.factors)]
    keep = [None if not g.dropout else torch.empty(g.stop - g.start, x.shape[-1], dtype=torch.bool, device=x.device)
            .bernoulli_(1 - g.dropout, generator=g.generator) for g in groups]
    plan = _Plan(groups, layers, x.shape)
    outputs: tuple[Tensor, ...] = _GroupedLinear.apply(  # type: ignore[no-untyped-call]
        x, plan, *keep, *(layer.W if isinstance(layer.W, Tensor) else None for layer in layers),
        *(layer.b for layer in layers), *plan.tensors)
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

    def __init__(self, groups: Sequence[Group], layers: Sequence[Frozen], shape: torch.Size) -> None:
        self.outputs = [layer.outputs for layer in layers]
        self.packed = [layer.W if isinstance(layer.W, Stripped) else None for layer in layers]
        self.spans = [(g.start, g.stop) for g in groups]
        self.kept = [1.0 - g.dropout for g in groups]
        self.parts = [[(i, f.scale) for i, f in enumerate(g.factors) if f is not None] for g in groups]
        self.tensors = [t for g in groups for f in g.factors if f is not None for t in (f.A, f.B)]
        self.first = 2 + len(groups) + 2 * len(layers)
        """Where the factors begin among the node's inputs."""
        self.stacks = self._worth_stacking(shape)

    def _worth_stacking(self, shape: torch.Size) -> bool:
        lengths = {stop - start for start, stop in self.spans}
        whole = sum(stop - start for start, stop in self.spans) == shape[:-1].numel()
        if len(self.spans) < STACKED_FROM or len(lengths) != 1 or not whole or min(self.kept) < 1:
            return False
        ranks = [A.shape[0] for A in self.tensors[::2]]
        return max(ranks) * len(self.spans) * len(self.outputs) <= _MOST_PADDING * sum(ranks)

    def factors(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """A and B of each segment's projections, in one dtype."""
        at = 0
        for part in self.parts:
            own = [t.to(dtype) for t in tensors[at:at + 2 * len(part)]]
            at += 2 * len(part)
            yield own[0::2], own[1::2]


class _GroupedLinear(torch.autograd.Function):
    """The node. Tensors arrive as dropout masks, all W, all b, then A, B of each segment's projections."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: _Plan, *flat: Tensor | None) -> tuple[Tensor, ...]:
        keep, W, b, factors = _parts(plan, flat)
        x_TI = x.reshape(-1, x.shape[-1])
        y = [x_TI.new_zeros(len(x_TI), outputs) if W_OI is None else product(x_TI, W_OI, bias)
             for W_OI, bias, outputs in zip(W, b, plan.outputs, strict=True)]
        if plan.stacks:
            H = _Stacks(plan, factors, x.dtype).forward(x_TI, y)
        else:
            H = []
            for s, ((start, stop), (A, B)) in enumerate(zip(plan.spans, plan.factors(factors, x.dtype), strict=True)):
                h_SR = _dropped(x_TI[start:stop], keep[s], plan.kept[s]) @ _cat(A).t()
                for (i, scale), h, B_OR in zip(plan.parts[s], _split(h_SR, A), B, strict=True):
                    y[i][start:stop].addmm_(h, B_OR.t(), alpha=scale)
                H.append(h_SR)
        ctx.plan, ctx.count = plan, len(H)
        ctx.save_for_backward(x, *H, *flat)
        ctx.set_materialize_grads(False)
        return tuple(y_TO.view(*x.shape[:-1], y_TO.shape[-1]) for y_TO in y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        nothing: list[Tensor | None] = [None] * (plan.first + len(plan.tensors))
        if all(grad is None for grad in grads):
            return tuple(nothing)
        x, *saved = ctx.saved_tensors
        H, (keep, W, _, factors) = saved[:ctx.count], _parts(plan, saved[ctx.count:])
        x_TI = x.reshape(-1, x.shape[-1])
        g = [None if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in grads]
        dx_TI = _through_frozen(g, W, x_TI) if ctx.needs_input_grad[0] else None
        if plan.stacks:
            own = _Stacks(plan, factors, x.dtype).backward(x_TI, H[0], g, dx_TI)
        else:
            own = []
            for s, (A, B) in enumerate(plan.factors(factors, x.dtype)):
                own += _one_segment(plan, s, x_TI, keep[s], H[s], g, dx_TI, A, B)
        wanted = ctx.needs_input_grad[plan.first:]
        nothing[plan.first:] = [None if grad is None or not want else grad.to(factor.dtype)
                                for grad, want, factor in zip(own, wanted, factors, strict=True)]
        nothing[0] = None if dx_TI is None else dx_TI.view(x.shape)
        return tuple(nothing)


def _through_frozen(g: Sequence[Tensor | None], W: Sequence[Tensor | Stripped | None], x_TI: Tensor) -> Tensor:
    """Σ gᵢ Wᵢ, of all tokens; zeros where no frozen product is part of the node."""
    dx_TI: Tensor | None = None
    for g_TO, W_OI in zip(g, W, strict=True):
        if g_TO is None or W_OI is None:
            continue
        if isinstance(W_OI, Stripped):
            dx_TI = W_OI.add_transposed(g_TO, dx_TI)
        else:
            dx_TI = g_TO @ W_OI if dx_TI is None else dx_TI.addmm_(g_TO, W_OI)
    return torch.zeros_like(x_TI) if dx_TI is None else dx_TI


def _one_segment(plan: _Plan, s: int, x_TI: Tensor, keep: Tensor | None, h_SR: Tensor, g: Sequence[Tensor | None],
                 dx_TI: Tensor | None, A: Sequence[Tensor], B: Sequence[Tensor]) -> list[Tensor | None]:
    """dA and dB of a segment's projections in turn; what reaches x is added to `dx_TI`."""
    start, stop = plan.spans[s]
    dh_SR, A_RI = torch.empty_like(h_SR), _cat(A)
    for (i, scale), dh, B_OR in zip(plan.parts[s], _split(dh_SR, A), B, strict=True):
        g_TO = g[i]
        if g_TO is None:
            dh.zero_()
        else:
            torch.addmm(dh, g_TO[start:stop], B_OR, beta=0, alpha=scale, out=dh)
    x_SI = _dropped(x_TI[start:stop], keep, plan.kept[s])
    if dx_TI is not None and keep is None:
        dx_TI[start:stop].addmm_(dh_SR, A_RI)
    elif dx_TI is not None:
        dx_TI[start:stop] += _dropped(dh_SR @ A_RI, keep, plan.kept[s])
    grads: list[Tensor | None] = []
    for (i, scale), dA, h in zip(plan.parts[s], torch.split(dh_SR.t() @ x_SI, [len(a) for a in A]), _split(h_SR, A),
                                 strict=True):
        g_TO = g[i]
        grads += (None, None) if g_TO is None else (dA, (g_TO[start:stop].t() @ h).mul_(scale))
    return grads


class _Stacks:
    """Factors of equally long segments as one tensor for each projection, padded to the largest rank."""

    def __init__(self, plan: _Plan, factors: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.plan, self.count = plan, len(plan.spans)
        self.ranks = [A.shape[0] for A in factors[::2]]
        width, inputs = max(self.ranks), factors[0].shape[1]
        self.width = width
        self.A_NPRI = factors[0].new_zeros(self.count, len(plan.outputs) * width, inputs, dtype=dtype)
        self.B = [factors[0].new_zeros(self.count, outputs, width, dtype=dtype) for outputs in plan.outputs]
        for n, i, scale, at in self.places():
            A_RI, B_OR = factors[2 * at], factors[2 * at + 1]
            self.A_NPRI[n, i * width:i * width + len(A_RI)] = A_RI
            torch.mul(B_OR, scale, out=self.B[i][n, :, :B_OR.shape[1]])

    def places(self) -> Iterator[tuple[int, int, float, int]]:
        """Segment, projection, scale and number of each pair of factors."""
        at = 0
        for n, part in enumerate(self.plan.parts):
            for i, scale in part:
                yield n, i, scale, at
                at += 1

    def forward(self, x_TI: Tensor, y: Sequence[Tensor]) -> list[Tensor]:
        """Add every change to y in place; returns H (N, S, P·R)."""
        h_NSR = torch.bmm(x_TI.view(self.count, -1, x_TI.shape[1]), self.A_NPRI.transpose(1, 2))
        for y_TO, h, B_NOR in zip(y, torch.split(h_NSR, self.width, 2), self.B, strict=True):
            y_TO.view(self.count, -1, y_TO.shape[1]).baddbmm_(h, B_NOR.transpose(1, 2))
        return [h_NSR]

    def backward(self, x_TI: Tensor, h_NSR: Tensor, g: Sequence[Tensor | None],
                 dx_TI: Tensor | None) -> list[Tensor | None]:
        """dA and dB of every pair in turn; what reaches x is added to `dx_TI`."""
        x_NSI = x_TI.view(self.count, -1, x_TI.shape[1])
        g_N = [None if g_TO is None else g_TO.view(self.count, -1, g_TO.shape[1]) for g_TO in g]
        dh_NSR = torch.cat([torch.zeros_like(h) if g_NSO is None else torch.bmm(g_NSO, B_NOR)
                            for g_NSO, h, B_NOR in zip(g_N, torch.split(h_NSR, self.width, 2), self.B, strict=True)], 2)
        if dx_TI is not None:
            dx_TI.view(x_NSI.shape).baddbmm_(dh_NSR, self.A_NPRI)
        dA_NRI = torch.bmm(dh_NSR.transpose(1, 2), x_NSI)
        dB = [None if g_NSO is None else torch.bmm(g_NSO.transpose(1, 2), h)
              for g_NSO, h in zip(g_N, torch.split(h_NSR, self.width, 2), strict=True)]
        grads: list[Tensor | None] = []
        for n, i, scale, at in self.places():
            dB_NOR, rank, first = dB[i], self.ranks[at], i * self.width
            grads += (None, None) if dB_NOR is None else (
                dA_NRI[n, first:first + rank], dB_NOR[n, :, :rank] * scale)
        return grads


def _parts(plan: _Plan, flat: Sequence[Tensor | None]) -> tuple[Any, Any, Any, Any]:
    """Masks, all W, all b and the factors, from the node's list."""
    groups, layers = len(plan.spans), len(plan.outputs)
    edges = (0, *accumulate((groups, layers, layers)), len(flat))
    masks, plain, b, factors = (flat[a:z] for a, z in pairwise(edges))
    W = [W_OI if packed is None else packed for W_OI, packed in zip(plain, plan.packed, strict=True)]
    return masks, W, b, factors


def _cat(A: Sequence[Tensor]) -> Tensor:
    return A[0] if len(A) == 1 else torch.cat(list(A))


def _split(h_SR: Tensor, A: Sequence[Tensor]) -> Sequence[Tensor]:
    """The columns of each projection."""
    return (h_SR,) if len(A) == 1 else torch.split(h_SR, [len(A_RI) for A_RI in A], 1)


def _dropped(x_SI: Tensor, keep: Tensor | None, kept: float) -> Tensor:
    """x where `keep` is true, divided by the share that is kept."""
    return x_SI if keep is None else (x_SI * keep).div_(kept)
