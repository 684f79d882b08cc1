"""The frozen side of an adapted linear layer: its product, plain or from codes, and what reaches its input.

    y = x Wᵀ + b,   dx = g W

A quantized W is read by the kernel as it is, or else unpacked a strip of rows at a time into one buffer for all layers;
each strip is multiplied while it is in the cache. Nothing here gives W or b a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.core import native_low_rank
from deltaw.core.methods import lora
from deltaw.core.packed import Packed, Workspace


class Stripped(NamedTuple):
    """A quantized W (O, I), and the memory to unpack it in."""

    packed: Packed
    workspace: Workspace

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)"""
        return self.packed.shape

    def write_product(self, x_NI: Tensor, b: Tensor | None, y_NO: Tensor) -> None:
        """Write x Wᵀ + b to y."""
        if native_low_rank.product(x_NI, self.packed, b, y_NO):
            return
        for rows, W_RI in self.packed.strips(x_NI.dtype, self.workspace):
            write_product(x_NI, W_RI, None if b is None else b[rows], y_NO[:, rows])

    def add_transposed(self, g_NO: Tensor, dx_NI: Tensor | None) -> Tensor:
        """dx + g W, in dx's memory where there is a dx."""
        if torch.is_grad_enabled():  # a second derivative keeps W, so it cannot lie in memory that is used again
            dense = g_NO @ self.packed.dense(g_NO.dtype)
            return dense if dx_NI is None else dx_NI.add_(dense)
        to = g_NO.new_empty(len(g_NO), self.shape[1]) if dx_NI is None else dx_NI
        if native_low_rank.transposed_product(g_NO, self.packed, to, add=dx_NI is not None):
            return to
        for rows, W_RI in self.packed.strips(g_NO.dtype, self.workspace):
            dx_NI = add_transposed(g_NO[:, rows], W_RI, dx_NI)
        assert dx_NI is not None  # a weight has rows
        return dx_NI


class Projection(NamedTuple):
    """One linear layer over x: frozen W (O, I) in x's dtype and b (O,) or None, with A (R, I), B (O, R) and s."""

    W: Tensor | Stripped
    b: Tensor | None
    A: Tensor
    B: Tensor
    scale: float


def frozen_linear(x: Tensor, W: Stripped, b: Tensor | None) -> Tensor:
    """x Wᵀ + b (..., O) of a frozen quantized layer; W is not kept unpacked for the backward pass."""
    y: Tensor = _FrozenLinear.apply(x, W, b)  # type: ignore[no-untyped-call]
    return y


def reference(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    """What `low_rank_linear` computes, without dropout, one plain operation after another."""
    dense = [p.W.packed.dense(x.dtype) if isinstance(p.W, Stripped) else p.W for p in projections]
    return tuple(lora.add_low_rank(F.linear(x, W, p.b), x, p.A, p.B, p.scale)
                 for W, p in zip(dense, projections, strict=True))


class _FrozenLinear(torch.autograd.Function):
    """A quantized layer alone: y = x Wᵀ + b, dx = g W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Stripped, b: Tensor | None) -> Tensor:
        ctx.W = W
        y, y_NO = output_for(x, W.shape[0])
        W.write_product(x.reshape(-1, x.shape[-1]), b, y_NO)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        g, = grads
        dx = ctx.W.add_transposed(g.reshape(-1, g.shape[-1]), None)
        return dx.view(*g.shape[:-1], ctx.W.shape[1]), None, None


def output_for(x: Tensor, outputs: int) -> tuple[Tensor, Tensor]:
    """Memory for a product with x (..., I): y (..., O), and the same as y (N, O) to write to.

    A node returns the first. Had it made (N, O) and returned a view of it, the model could not change its output in
    place, as some do with a linear layer's (DeBERTa scales its queries so).
    """
    y = x.new_empty(*x.shape[:-1], outputs)
    return y, y.view(-1, outputs)


def write_product(x_NI: Tensor, W: Tensor | Stripped | None, b: Tensor | None, y_NO: Tensor) -> None:
    """Write x Wᵀ + b to y; zeros where there is no W."""
    if W is None:
        y_NO.zero_()
    elif isinstance(W, Stripped):
        W.write_product(x_NI, b, y_NO)
    elif native_low_rank.product(x_NI, W, b, y_NO):
        pass
    elif b is None:
        torch.mm(x_NI, W.t(), out=y_NO)
    else:
        torch.addmm(b, x_NI, W.t(), out=y_NO)


def write_transposed(g_NO: Tensor, W_OI: Tensor, dx_NI: Tensor, *, add: bool = False) -> None:
    """Write g W to dx, or add it."""
    if not native_low_rank.transposed_product(g_NO, W_OI, dx_NI, add=add):
        torch.addmm(dx_NI, g_NO, W_OI, beta=float(add), out=dx_NI)


def add_transposed(g_NO: Tensor, W_OI: Tensor | Stripped, dx_NI: Tensor | None) -> Tensor:
    """dx + g W, in dx's memory where there is a dx."""
    if isinstance(W_OI, Stripped):
        return W_OI.add_transposed(g_NO, dx_NI)
    if torch.is_grad_enabled():  # a second derivative
        return g_NO @ W_OI if dx_NI is None else dx_NI.addmm_(g_NO, W_OI)
    to = g_NO.new_empty(len(g_NO), W_OI.shape[1]) if dx_NI is None else dx_NI
    write_transposed(g_NO, W_OI, to, add=dx_NI is not None)
    return to


def through_frozen(g: Sequence[Tensor | None], W: Sequence[Tensor | Stripped | None], x_TI: Tensor) -> Tensor:
    """Σ gᵢ Wᵢ (T, I), as x; zeros where no frozen product has a gradient."""
    dx_TI: Tensor | None = None
    for g_TO, W_OI in zip(g, W, strict=True):
        if g_TO is None or W_OI is None:
            continue
        dx_TI = add_transposed(g_TO, W_OI, dx_TI)
    return torch.zeros_like(x_TI) if dx_TI is None else dx_TI
