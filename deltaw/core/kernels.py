"""The fused low-rank linear: all projections of one input, with one node in the autograd graph.

    yᵢ = x Wᵢᵀ + bᵢ + sᵢ·(x' Aᵢᵀ) Bᵢᵀ        x' is x, or x after dropout; Wᵢ and bᵢ are frozen

Plain autograd makes a node of each product, and a tensor as large as x or y for each sum between them. Here

    forward     H = x' [A₁; A₂; …]ᵀ            one narrow product for all projections of x
                yᵢ = x Wᵢᵀ, yᵢ += sᵢ·Hᵢ Bᵢᵀ    in place
    backward    dH = [sᵢ·gᵢ Bᵢ]
                dx = Σ gᵢ Wᵢ + dH [A₁; A₂; …]  every product added to the same tensor
                dA = dHᵀ x',  dBᵢ = sᵢ·gᵢᵀ Hᵢ

A quantized W is unpacked in the forward and once more in the backward (`frozen`). In bfloat16, on processors that it is
for, one call of a kernel makes all the narrow products (`native_linear`).

x is kept once, and not at all where every A is frozen (LoRA-FA, arXiv 2308.03303: dB needs H alone). Neither BA nor any
other matrix of W's size is made, except where the rank is so high that the gradient of all of W is the shorter way
to dA and dB (`gradient_of_weight_is_shorter`, after RunLoRA, arXiv 2312.03415). No gradient is computed that nobody
asked for. `frozen.reference` is the same in plain operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deltaw.core.frozen import Projection, Stripped, output_for, write_product
from deltaw.core.native_linear import native_linear


def low_rank_linear(x: Tensor, projections: Sequence[Projection], dropout: float = 0.0) -> tuple[Tensor, ...]:
    """The outputs (..., O) of all projections of x (..., I), in x's dtype. Dropout is drawn once for all of them.

    W and b get no gradient. A and B may have another dtype: they are multiplied in x's, and their gradients come back
    in their own.
    """
    if not dropout and (made := native_linear(x, projections)) is not None:
        return made
    keep = None if not dropout else torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout)
    flat = [tensor for p in projections for tensor in (p.W, p.b, p.A, p.B)]
    outputs: tuple[Tensor, ...] = _LowRankLinear.apply(  # type: ignore[no-untyped-call]
        x, keep, 1.0 - dropout, tuple(p.scale for p in projections), *flat)
    return outputs


def gradient_of_weight_is_shorter(tokens: int, inputs: int, outputs: int, rank: int) -> bool:
    """Whether dA and dB cost fewer multiplications through gᵀx (O × I) than through the factors.

    >>> gradient_of_weight_is_shorter(4096, 576, 576, 8), gradient_of_weight_is_shorter(4096, 576, 576, 512)
    (False, True)
    """
    through_weight = tokens * inputs * outputs + 2 * rank * inputs * outputs
    return through_weight < tokens * rank * (inputs + outputs)


class _LowRankLinear(torch.autograd.Function):
    """The node. Tensors arrive as W, b, A, B for each projection in turn."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor | None, kept: float, scales: tuple[float, ...],
                *flat: Any) -> tuple[Tensor, ...]:
        W, b, A, B = _columns(flat)
        x_NI = x.reshape(-1, x.shape[-1])
        A_RI, like_x = _stack(A, x.dtype), [B_OR.to(x.dtype) for B_OR in B]
        H = _dropped(x_NI, keep, kept) @ A_RI.t()
        outputs, start = [], 0
        for i, scale in enumerate(scales):
            y, y_NO = output_for(x, W[i].shape[0])
            write_product(x_NI, W[i], b[i], y_NO)
            h_NR = H[:, start:start + A[i].shape[0]]
            y_NO.addmm_(h_NR, like_x[i].t(), alpha=scale)
            outputs.append(y)
            start += A[i].shape[0]
        for_A, for_B = any(ctx.needs_input_grad[6::4]), any(ctx.needs_input_grad[7::4])
        keeps_H = for_B and 4 * H.shape[1] <= x.shape[-1]
        keeps_x = for_A or (for_B and not keeps_H)
        ctx.save_for_backward(x if keeps_x else None, keep, H if keeps_H else None, A_RI, *like_x,
                              *(None if isinstance(w, Stripped) else w for w in W), *A, *B)
        ctx.kept, ctx.scales, ctx.stripped = kept, scales, [w if isinstance(w, Stripped) else None for w in W]
        ctx.shape = x.shape
        ctx.set_materialize_grads(False)  # an output that nobody used costs no zeros of its size
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        count = len(ctx.scales)
        if all(grad is None for grad in grads):
            return (None,) * (4 + 4 * count)
        x, keep, H, A_RI, *rest = ctx.saved_tensors
        like_x, plain, A, B = (rest[i * count:(i + 1) * count] for i in range(4))
        W = [tensor if stripped is None else stripped
             for tensor, stripped in zip(plain, ctx.stripped, strict=True)]
        g = [None if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in grads]
        for_A, for_B = ctx.needs_input_grad[6::4], ctx.needs_input_grad[7::4]
        if torch.is_grad_enabled():
            if x is None and any(for_B):
                raise NotImplementedError("a second derivative needs the layer's input, which is not kept where A is "
                                          "frozen: let A require a gradient")
            # Kept as values: a second derivative needs their graph.
            H, A_RI, like_x = None, _stack(A, A_RI.dtype), [B_OR.to(A_RI.dtype) for B_OR in B]
        dx = dH = None
        if ctx.needs_input_grad[0] or any(for_A):
            dH = _gradient_of_H(g, like_x, ctx.scales)
        if ctx.needs_input_grad[0]:
            assert dH is not None
            dx = _gradient_of_x(ctx.shape, keep, ctx.kept, g, W, dH, A_RI)
        dA: list[Tensor | None] = [None] * count
        dB: list[Tensor | None] = [None] * count
        if any(for_A) or any(for_B):
            dropped = None if x is None else _dropped(x.reshape(-1, x.shape[-1]), keep, ctx.kept)
            if dropped is not None and all(
                    gradient_of_weight_is_shorter(len(dropped), w.shape[1], w.shape[0], a.shape[0])
                    for w, a in zip(W, A, strict=True)):
                dA, dB = _through_weight(dropped, g, A, B, ctx.scales)
            else:
                dA, dB = _through_factors(dropped, g, A, B, ctx.scales, H, dH if any(for_A) else None, any(for_B))
        flat = [t for i in range(count) for t in (None, None, dA[i] if for_A[i] else None, dB[i] if for_B[i] else None)]
        return (dx, None, None, None, *flat)


def _gradient_of_H(g: Sequence[Tensor | None], B: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """[sᵢ·gᵢ Bᵢ]; small launches are what a GPU waits for, so one scale of all is multiplied once."""
    tokens = next(len(g_NO) for g_NO in g if g_NO is not None)
    parts = [B_OR.new_zeros(tokens, B_OR.shape[1]) if g_NO is None else g_NO @ B_OR
             for g_NO, B_OR in zip(g, B, strict=True)]
    if len(set(scales)) > 1:
        return torch.cat([part.mul_(scale) for part, scale in zip(parts, scales, strict=True)], 1)
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).mul_(scales[0])


def _gradient_of_x(shape: torch.Size, keep: Tensor | None, kept: float, g: Sequence[Tensor | None],
                   W: Sequence[Tensor | Stripped], dH: Tensor, A: Tensor) -> Tensor:
    dx_NI: Tensor | None = None
    if keep is not None:
        dx_NI = _dropped(dH @ A, keep, kept)
    for g_NO, W_OI in zip(g, W, strict=True):
        if g_NO is None:
            continue
        if isinstance(W_OI, Stripped):
            dx_NI = W_OI.add_transposed(g_NO, dx_NI)
        else:
            dx_NI = g_NO @ W_OI if dx_NI is None else dx_NI.addmm_(g_NO, W_OI)
    assert dx_NI is not None  # one of the outputs has a gradient
    return (dx_NI if keep is not None else dx_NI.addmm_(dH, A)).view(shape)


def _through_factors(x_NI: Tensor | None, g: Sequence[Tensor | None], A: Sequence[Tensor], B: Sequence[Tensor],
                     scales: Sequence[float], H: Tensor | None, dH: Tensor | None,
                     for_B: bool) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """dA = dHᵀ x, where dH is given, and dB = s·gᵀ H; x is None where neither needs it."""
    ranks = [A_RI.shape[0] for A_RI in A]
    dA: list[Tensor | None] = [None] * len(A)
    dB: list[Tensor | None] = [None] * len(A)
    if dH is not None:
        assert x_NI is not None  # it was kept for A
        joint = dH.t() @ x_NI
        if len({A_RI.dtype for A_RI in A}) == 1:
            joint = joint.to(A[0].dtype)  # all parts at once
        dA = [part.to(A_RI.dtype) for part, A_RI in zip(torch.split(joint, ranks), A, strict=True)]
    if for_B:
        if H is None:
            assert x_NI is not None  # it was kept instead of H
            H = x_NI @ _stack(A, x_NI.dtype).t()
        dB = [None if g_NO is None else gradient_of_B(g_NO, h_NR).mul_(scale).to(B_OR.dtype)
              for g_NO, h_NR, scale, B_OR in zip(g, torch.split(H, ranks, 1), scales, B, strict=True)]
    return dA, dB


def gradient_of_B(g_NO: Tensor, h_NR: Tensor) -> Tensor:
    """gᵀ h (O, R). Rows of R numbers leave a processor's vectors half empty: it makes the transposed product."""
    return (h_NR.t() @ g_NO).t().contiguous() if g_NO.device.type == "cpu" else g_NO.t() @ h_NR


def _through_weight(x_NI: Tensor, g: Sequence[Tensor | None], A: Sequence[Tensor], B: Sequence[Tensor],
                    scales: Sequence[float]) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """dW = s·gᵀ x, then dA = Bᵀ dW and dB = dW Aᵀ."""
    dA: list[Tensor | None] = []
    dB: list[Tensor | None] = []
    for g_NO, A_RI, B_OR, scale in zip(g, A, B, scales, strict=True):
        if g_NO is None:
            dA.append(None)
            dB.append(None)
            continue
        dW_OI = (g_NO.t() @ x_NI).mul_(scale)
        dA.append((B_OR.to(dW_OI.dtype).t() @ dW_OI).to(A_RI.dtype))
        dB.append((dW_OI @ A_RI.to(dW_OI.dtype).t()).to(B_OR.dtype))
    return dA, dB


def _columns(flat: Sequence[Any]) -> tuple[Sequence[Tensor | Stripped], Sequence[Any], Sequence[Tensor],
                                           Sequence[Tensor]]:
    """W, b, A and B of all projections, from W, b, A, B of each in turn."""
    return flat[0::4], flat[1::4], flat[2::4], flat[3::4]


def _stack(A: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """[A₁; A₂; …] in one dtype."""
    return A[0].to(dtype) if len(A) == 1 else torch.cat([A_RI.to(dtype) for A_RI in A])


def _dropped(x_NI: Tensor, keep: Tensor | None, kept: float) -> Tensor:
    """x where `keep` is true, divided by the share that is kept."""
    return x_NI if keep is None else (x_NI * keep.reshape(x_NI.shape)).div_(kept)
