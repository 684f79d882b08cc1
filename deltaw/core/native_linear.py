"""The low-rank linear of `kernels`, by the kernel: one call forward, one backward.

    yᵢ = x Wᵢᵀ + bᵢ + sᵢ·(x Aᵢᵀ) Bᵢᵀ
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from deltaw.core import native_low_rank
from deltaw.core.bank import Place
from deltaw.core.frozen import Projection, Stripped, output_for, reference, through_frozen, write_product
from deltaw.core.native_low_rank import Packed, Part, Segment, Target
from deltaw.core.native_weight import FrozenLayer


def native_linear(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...] | None:
    """What `low_rank_linear` returns, where the kernel can be asked and all factors are trained; else None."""
    if not native_low_rank.takes(x) or not x.numel() \
            or not all(t.requires_grad for p in projections for t in (p.A, p.B)):
        return None
    segments = [Segment(0, x.numel() // x.shape[-1], [Part(i, p.A, p.B, p.scale) for i, p in enumerate(projections)])]
    if not native_low_rank.fits(x, [p.W.shape[0] for p in projections], segments):
        return None
    made: tuple[Tensor, ...] = _NativeLinear.apply(  # type: ignore[no-untyped-call]
        x, segments, *(tensor for p in projections for tensor in (p.W, p.b, p.A, p.B)))
    return made


def outputs(x_TI: Tensor, y: Sequence[Tensor], W: Sequence[Tensor | Stripped | None], b: Sequence[Tensor | None],
            segments: Packed) -> Tensor:
    """Write every product with x and its changes to y (T, O); returns h = s·x Aᵀ (T, columns) for `gradients`.

    A W of None is an output of the change alone.
    """
    layers = [_layer(x_TI, W_OI, bias) for W_OI, bias in zip(W, b, strict=True)]
    for y_TO, W_OI, bias, own in zip(y, W, b, layers, strict=True):
        if own.W is None:
            write_product(x_TI, W_OI, bias, y_TO)
    return native_low_rank.forward(x_TI, y, segments, layers)


def _layer(x_TI: Tensor, W: Tensor | Stripped | None, b: Tensor | None) -> FrozenLayer:
    """What the kernel multiplies with itself; nothing where others do."""
    layer = FrozenLayer(W.packed if isinstance(W, Stripped) else W, b)
    return layer if layer.fits(x_TI) else FrozenLayer()


def gradients(x_TI: Tensor, h_TC: Tensor, g: Sequence[Tensor | None], W: Sequence[Tensor | Stripped | None],
              segments: Sequence[Segment], places: Sequence[Place] = (), *, of_x: bool = True,
              ) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx (T, I), None where nobody asks; dA and dB of every part in turn, float32, None where its y has no g.

    With a place in a bank for each part they are added there instead, and none is returned.
    """
    parts = [part for segment in segments for part in segment.parts]
    targets = _targets(parts, places)
    dx_TI = through(x_TI, h_TC, g, W, native_low_rank.packed(segments, targets), of_x=of_x)
    if not places:
        return dx_TI, [None if g[part.which] is None else grad
                       for part, to in zip(parts, targets, strict=True) for grad in to]
    for part, place, to in zip(parts, places, targets, strict=True):
        if g[part.which] is None:
            continue
        if to.dA is place.gradients[0]:
            place.show()
        else:
            place.add(*to)
    return dx_TI, []


def through(x_TI: Tensor, h_TC: Tensor, g: Sequence[Tensor | None], W: Sequence[Tensor | Stripped | None],
            segments: Packed, *, of_x: bool) -> Tensor | None:
    """Write the gradients of all parts to their targets; returns dx (T, I), None where nobody asks."""
    g = [None if g_TO is None else g_TO.contiguous() for g_TO in g]
    layers = [_layer(x_TI, W_OI, None) for W_OI in W]
    others = [W_OI if own.W is None else None for W_OI, own in zip(W, layers, strict=True)]
    found = any(W_OI is not None and g_TO is not None for W_OI, g_TO in zip(others, g, strict=True))
    dx_TI = None if not of_x else through_frozen(g, others, x_TI) if found else x_TI.new_empty(x_TI.shape)
    native_low_rank.backward(x_TI, h_TC, g, dx_TI, segments, layers, onto_dx=found)
    return dx_TI


def _targets(parts: Sequence[Part], places: Sequence[Place]) -> list[Target]:
    """Where the kernel writes: to places that are free, else to memory of their own."""
    fresh, own = {place for place in places if _is_target(place)}, []
    for part, place in zip_longest(parts, places):
        if place in fresh:
            fresh.remove(place)  # an adapter's next segment is added to what this one writes
            own.append(Target(*place.gradients))
        else:
            own.append(_own_target(part))
    return own


def _own_target(part: Part) -> Target:
    return Target(torch.empty_like(part.A, dtype=torch.float32), torch.empty_like(part.B, dtype=torch.float32))


def _is_target(place: Place) -> bool:
    """Whether gradients may be written to their place at once: nothing is there, and it holds float32."""
    return place.gradients[0].dtype == torch.float32 and place.is_fresh


class _NativeLinear(torch.autograd.Function):
    """The node. Tensors arrive as W, b, A, B for each projection in turn."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, segments: Sequence[Segment], *flat: Any) -> tuple[Tensor, ...]:
        x_TI = x.reshape(-1, x.shape[-1])
        made = [output_for(x, W.shape[0]) for W in flat[0::4]]
        h_TC = outputs(x_TI, [y_TO for _, y_TO in made], flat[0::4], flat[1::4], native_low_rank.packed(segments))
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
        dx_TI, found = gradients(x_TI, h_TC, g, flat[0::4], ctx.segments, of_x=ctx.needs_input_grad[0])
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
