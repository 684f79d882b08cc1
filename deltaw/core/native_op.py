"""The low-rank linear with the kernel's narrow products, as one opaque operation that a compiler can place.

    yᵢ = x Wᵢᵀ + bᵢ + sᵢ·(x Aᵢᵀ) Bᵢᵀ

`native_linear` is the same for layers that run as they are. A bias that is not there has no numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deltaw.core import native_linear, native_low_rank
from deltaw.core.frozen import Projection, Stripped
from deltaw.core.native_low_rank import Part, Segment


def is_for(x: Tensor, projections: Sequence[Projection]) -> bool:
    """Whether the operation takes these layers of x, from what a compiler knows of tensors."""
    factors = [t for p in projections for t in (p.A, p.B)]
    return (native_low_rank.takes(x) and torch.is_grad_enabled() and all(p.B.shape[0] % 32 == 0 for p in projections)
            and all(t.requires_grad and t.dtype == torch.float32 for t in factors)
            and not any(isinstance(p.W, Stripped) for p in projections)
            and sum(p.A.shape[0] + p.A.shape[0] % 2 for p in projections) <= native_low_rank.WIDEST)


def low_rank_linear(x: Tensor, projections: Sequence[Projection]) -> Sequence[Tensor]:
    """What `kernels.low_rank_linear` returns, where `is_for` says so."""
    none = x.new_empty(0)
    outputs: Sequence[Tensor] = torch.ops.deltaw.low_rank_linear(
        x, [p.W for p in projections], [none if p.b is None else p.b for p in projections],
        [p.A for p in projections], [p.B for p in projections], [p.scale for p in projections])
    return outputs[:-1]


@torch.library.custom_op("deltaw::low_rank_linear", mutates_args=())
def _forward(x: Tensor, W: Sequence[Tensor], b: Sequence[Tensor], A: Sequence[Tensor], B: Sequence[Tensor],
             scales: Sequence[float]) -> list[Tensor]:
    """Every y (..., O), and h (T, columns)."""
    x_TI = x.reshape(-1, x.shape[-1])
    y = [x.new_empty(*x.shape[:-1], W_OI.shape[0]) for W_OI in W]
    flat, biases = [t.view(-1, t.shape[-1]) for t in y], [t if t.numel() else None for t in b]
    return [*y, native_linear.outputs(x_TI, flat, W, biases, native_low_rank.packed(
        _segments(len(x_TI), A, B, scales)))]


@_forward.register_fake
def _(x: Tensor, W: Sequence[Tensor], b: Sequence[Tensor], A: Sequence[Tensor], B: Sequence[Tensor],
      scales: Sequence[float]) -> list[Tensor]:
    columns = native_low_rank.columns_of(_segments(0, A, B, scales))
    return [*(x.new_empty(*x.shape[:-1], W_OI.shape[0]) for W_OI in W), x.new_empty(x.numel() // x.shape[-1], columns)]


@torch.library.custom_op("deltaw::low_rank_linear_backward", mutates_args=())
def _backward(g: Sequence[Tensor], x: Tensor, h: Tensor, W: Sequence[Tensor], A: Sequence[Tensor],
              B: Sequence[Tensor], scales: Sequence[float]) -> list[Tensor]:
    """dx (..., I), and dA, dB of every projection in turn."""
    x_TI, g_TO = x.reshape(-1, x.shape[-1]), [t.reshape(-1, t.shape[-1]) for t in g]
    dx_TI, found = native_linear.gradients(x_TI, h, g_TO, W, _segments(len(x_TI), A, B, scales))
    assert dx_TI is not None  # it was asked for
    return [dx_TI.view(x.shape), *(t for t in found if t is not None)]


@_backward.register_fake
def _(g: Sequence[Tensor], x: Tensor, h: Tensor, W: Sequence[Tensor], A: Sequence[Tensor], B: Sequence[Tensor],
      scales: Sequence[float]) -> list[Tensor]:
    return [x.new_empty(x.shape), *(torch.empty_like(t) for pair in zip(A, B, strict=True) for t in pair)]


def _segments(tokens: int, A: Sequence[Tensor], B: Sequence[Tensor], scales: Sequence[float]) -> list[Segment]:
    return [Segment(0, tokens, [Part(i, *own) for i, own in enumerate(zip(A, B, scales, strict=True))])]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, W, _, A, B, ctx.scales = inputs
    ctx.count = len(W)
    ctx.save_for_backward(x, output[-1], *W, *A, *B)


def _differentiate(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    x, h, *rest = ctx.saved_tensors
    W, A, B = (rest[i * ctx.count:(i + 1) * ctx.count] for i in range(3))
    g = [x.new_zeros(*x.shape[:-1], W_OI.shape[0]) if grad is None else grad
         for grad, W_OI in zip(grads[:-1], W, strict=True)]
    dx, *found = _backward(g, x, h, W, A, B, ctx.scales)
    return dx, [None] * ctx.count, [None] * ctx.count, found[0::2], found[1::2], None


_forward.register_autograd(_differentiate, setup_context=_remember)
