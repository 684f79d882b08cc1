"""The low-rank linear of `kernels`, with the kernel's narrow products: one call forward, one backward.

    yᵢ = x Wᵢᵀ + bᵢ + sᵢ·(x Aᵢᵀ) Bᵢᵀ
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deltaw.core import native_low_rank
from deltaw.core.frozen import Projection, Stripped, output_for, reference, through_frozen, write_product
from deltaw.core.native_low_rank import Part, Segment


def native_linear(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...] | None:
    """What `low_rank_linear` returns, where the kernel can be asked and all factors are trained; else None."""
    if not native_low_rank.takes(x) or not x.numel() \
            or not all(t.requires_grad for p in projections for t in (p.A, p.B)):
        return None
    segments = [Segment(0, x.numel() // x.shape[-1], [Part(i, p.A, p.B, p.scale) for i, p in enumerate(projections)])]
    if not native_low_rank.fits(x, [p.W.shape[0] for p in projections], segments):
        return None
    outputs: tuple[Tensor, ...] = _NativeLinear.apply(  # type: ignore[no-untyped-call]
        x, segments, *(tensor for p in projections for tensor in (p.W, p.b, p.A, p.B)))
    return outputs


class _NativeLinear(torch.autograd.Function):
    """The node. Tensors arrive as W, b, A, B for each projection in turn."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, segments: Sequence[Segment], *flat: Any) -> tuple[Tensor, ...]:
        x_TI = x.reshape(-1, x.shape[-1])
        made = [output_for(x, W.shape[0]) for W in flat[0::4]]
        for (_, y_TO), W, b in zip(made, flat[0::4], flat[1::4], strict=True):
            write_product(x_TI, W, b, y_TO)
        h_TC = native_low_rank.forward(x_TI, [y_TO for _, y_TO in made], segments)
        ctx.segments, ctx.stripped = segments, [t if isinstance(t, Stripped) else None for t in flat]
        ctx.save_for_backward(x, h_TC, *(None if isinstance(t, Stripped) else t for t in flat))
        ctx.set_materialize_grads(False)  # an output that nobody used costs no zeros of its size
        return tuple(y for y, _ in made)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = [None] * len(ctx.stripped)
        if all(grad is None for grad in grads):
            return (None, None, *nothing)
        x, h_TC, *plain = ctx.saved_tensors
        flat = [t if s is None else s for t, s in zip(plain, ctx.stripped, strict=True)]
        if torch.is_grad_enabled():
            return _differentiable(ctx, x, flat, grads)
        x_TI = x.reshape(-1, x.shape[-1])
        g = [None if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in grads]
        dx_TI = through_frozen(g, flat[0::4], x_TI) if ctx.needs_input_grad[0] else None
        found = native_low_rank.gradients(x_TI, h_TC, g, dx_TI, ctx.segments)
        of_factors = [t if t is None else t.to(factor.dtype) for t, factor in zip(
            found, (t for i in range(2, len(flat), 4) for t in flat[i:i + 2]), strict=True)]
        return (None if dx_TI is None else dx_TI.view(x.shape), None,
                *(t for i in range(0, len(of_factors), 2) for t in (None, None, *of_factors[i:i + 2])))


def _differentiable(ctx: Any, x: Tensor, flat: Sequence[Any], grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """The gradients with a graph of their own, for a second derivative."""
    parts = [Projection(W, b, A, B, part.scale) for W, b, A, B, part in zip(
        flat[0::4], flat[1::4], flat[2::4], flat[3::4], ctx.segments[0].parts, strict=True)]
    used = [(y, grad) for y, grad in zip(reference(x, parts), grads, strict=True) if grad is not None]
    wanted = [(0, x)] * ctx.needs_input_grad[0] + [(2 + i, flat[i]) for i in range(len(flat)) if i % 4 > 1]
    found = torch.autograd.grad([y for y, _ in used], [t for _, t in wanted], [grad for _, grad in used],
                                create_graph=True, allow_unused=True)
    every: list[Tensor | None] = [None] * (2 + len(flat))
    for (at, _), grad in zip(wanted, found, strict=True):
        every[at] = grad
    return tuple(every)
