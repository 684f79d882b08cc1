"""LoRA: ΔW = s·BA, and h = W₀x + s·B(Ax) (Hu et al. 2021, eq. 3).

The equation in every shape that a weight can have. A *geometry* says how a weight of the base is seen as a matrix with
O rows (outputs) and I columns (inputs); A_RI and B_OR are the factors of the change to that matrix. This file knows
tensors only: no modules, no names, no state.

    init     A ~ U(-1/√I, 1/√I), B = 0     so that ΔW = 0 at the start
    scale    s = α/r, or α/√r (rsLoRA)     kept in `LoraConfig.scaling`
    forward  y ← y + s·(x Aᵀ) Bᵀ           never forms BA: O(T·R·(I+O)) instead of O(T·I·O)
    ΔW       s·BA, summed in float32 or wider
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.core.geometry import Geometry


def initialise(A: Tensor, B: Tensor, how: bool | str, geometry: Geometry, rank: int,
               generator: torch.Generator | None = None) -> None:
    """Fill new factors in place, so that ΔW = 0 unless `how` is False.

    A is Kaiming-uniform with a = √5, which is U(-1/√I, 1/√I); "gaussian" gives N(0, 1/r²). An embedding's A is zero and
    its B normal, since a row of A is looked up and not summed over (loralib's choice; ΔW is zero either way).
    """
    if A.is_meta:
        return
    with torch.no_grad():
        first, second = (B, A) if geometry.kind == "embedding" and how is True else (A, B)
        if how is True and geometry.kind != "embedding":
            bound = geometry.in_features**-0.5
            first.uniform_(-bound, bound, generator=generator)
        else:
            first.normal_(std=1 / rank if how == "gaussian" else 1.0, generator=generator)
        if how is False:
            first.mul_(geometry.in_features**-0.5)
            second.normal_(std=0.02, generator=generator)
        else:
            second.zero_()


def add_low_rank(y: Tensor, x: Tensor, A_RI: Tensor, B_OR: Tensor, scale: float) -> Tensor:
    """y + s·(x Aᵀ) Bᵀ for x of shape (..., I) and y of shape (..., O), computed in x's dtype.

    Where nothing is differentiated the sum goes into y's own storage, which saves a pass over y.
    """
    return add_widened(y, F.linear(x, A_RI.to(x.dtype)), B_OR, scale)


def add_widened(y: Tensor, h: Tensor, B_OR: Tensor, scale: float) -> Tensor:
    """y + s·h Bᵀ, where h (..., R) is x Aᵀ."""
    if y.dtype != h.dtype or autocasts(y):
        return y + (F.linear(h, B_OR.to(h.dtype)) * scale).to(y.dtype)
    y_NO, h_NR, B_RO = y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1]), B_OR.to(h.dtype).t()
    if not torch.is_grad_enabled() and y.is_contiguous():
        y_NO.addmm_(h_NR, B_RO, alpha=scale)
        return y
    return torch.addmm(y_NO, h_NR, B_RO, alpha=scale).view(y.shape)


def add_low_rank_by_row(y_BTO: Tensor, x_BTI: Tensor, A_BRI: Tensor, B_BRO: Tensor) -> Tensor:
    """y + (x Aᵀ) Bᵀ with factors of its own for each of the B rows; `B_BRO` is s·Bᵀ."""
    h_BTR = torch.bmm(x_BTI, A_BRI.to(x_BTI.dtype).transpose(1, 2))
    B_BRO = B_BRO.to(h_BTR.dtype)
    if y_BTO.dtype != h_BTR.dtype or autocasts(y_BTO):
        return y_BTO + torch.bmm(h_BTR, B_BRO).to(y_BTO.dtype)
    if not torch.is_grad_enabled() and y_BTO.is_contiguous():
        return y_BTO.baddbmm_(h_BTR, B_BRO)
    return torch.baddbmm(y_BTO, h_BTR, B_BRO)


def autocasts(tensor: Tensor) -> bool:
    """Whether autocast is on where this tensor is; asked of the meta device, torch would raise."""
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


def delta_weight(A: Tensor, B: Tensor, scale: float, geometry: Geometry) -> Tensor:
    """ΔW = s·BA in the layout of the base's weight (`geometry.shape`), in float32 or A's wider dtype."""
    if autocasts(A):
        with torch.autocast(A.device.type, enabled=False):
            return delta_weight(A, B, scale, geometry)
    wide = torch.promote_types(A.dtype, torch.float32)
    A, B = A.to(wide), B.to(wide)
    match geometry.kind:
        case "linear" | "attention":
            delta = geometry.dense_out(B) @ A
        case "embedding":
            delta = (B @ A).t()
        case "conv" if geometry.is_dense_grouped(A):
            raise ValueError("a grouped convolution with an ungrouped A has no ΔW in the shape of its base weight")
        case "conv":
            delta = (B.flatten(1) @ A.flatten(1)).view(geometry.shape)
        case "parameter":
            delta = _expert_delta(A, B, geometry)
        case _:
            raise AssertionError(geometry.kind)
    if geometry.transposed and geometry.kind in ("linear", "attention"):
        delta = delta.t()
    return delta * scale


def _expert_delta(A: Tensor, B: Tensor, geometry: Geometry) -> Tensor:
    """ΔW of E stacked experts: A (E·R, I) with experts outermost, B (O, R·E) with experts innermost (PEFT's layout)."""
    experts = geometry.experts
    A_ERI = A.reshape(experts, -1, A.shape[-1])
    B_EOR = B.reshape(B.shape[0], -1, experts).permute(2, 0, 1)
    delta_EOI = torch.bmm(B_EOR, A_ERI)
    delta = delta_EOI.transpose(1, 2) if geometry.transposed else delta_EOI
    return delta.reshape(geometry.shape)
