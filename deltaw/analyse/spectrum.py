"""Singular values and directions of ΔW = s·B A, without ever forming ΔW.

    B = Q_B R_B,  Aᵀ = Q_A R_A,  s·R_B R_Aᵀ = P Σ Qᵀ  (R × R)      ⟹      ΔW = (Q_B P) Σ (Q_A Q)ᵀ

costs O(R²(I + O)) instead of O(I·O·min(I, O)). Computed in float64: adapters are small, and the directions of small
singular values are wanted too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaw.analyse.factors import Factors

NEGLIGIBLE = 1e-6
"""A singular value below this share of the largest is rounding, and its direction means nothing."""


@dataclass(frozen=True, eq=False, slots=True)
class Directions:
    """Singular vectors, largest singular value first; columns whose value is negligible are left out.

    K is the numerical rank of ΔW, KA that of A and KB that of B.
    """

    U_OK: Tensor
    """Output directions of ΔW."""
    S_K: Tensor
    """Singular values of ΔW, s included."""
    V_IK: Tensor
    """Input directions of ΔW."""
    A_IK: Tensor
    """Input directions of A alone: its right singular vectors (section 7.2 of the LoRA paper)."""
    B_OK: Tensor
    """Output directions of B alone: its left singular vectors."""

    def side(self, name: str) -> Tensor:
        """The directions of "A", "B", "input" (of ΔW) or "output" (of ΔW), one a column."""
        return {"A": self.A_IK, "B": self.B_OK, "input": self.V_IK, "output": self.U_OK}[name]


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteSpectrum:
    """How large ΔW is at a site, and over how many directions it is spread."""

    site: str
    kind: str
    """The last part of the site's name."""
    layer: int | None
    shape: tuple[int, int]
    """(O, I)."""
    rank: int
    """R of the factors."""
    parameters: int
    """Values in A and B."""
    frobenius: float
    """‖ΔW‖_F."""
    spectral: float
    """‖ΔW‖₂, the largest singular value."""
    stable_rank: float
    """‖ΔW‖_F² / ‖ΔW‖₂²: how many directions as strong as the strongest would make this norm; 0 for ΔW = 0."""
    effective_rank: float
    """exp of the entropy of σ/Σσ (Roy & Vetterli 2007): how many directions share the change; 0 for ΔW = 0."""
    singular_values: tuple[float, ...]
    """All that are not negligible, largest first."""


def decompose(factors: Factors) -> Directions:
    """The directions of a site's ΔW, of its A and of its B; float64, on the factors' device."""
    Q_OB, R_BR = torch.linalg.qr(factors.B_OR.double())
    Q_IA, R_AR = torch.linalg.qr(factors.A_RI.double().t())
    P, S_K, Q = torch.linalg.svd(factors.scale * R_BR @ R_AR.t(), full_matrices=False)
    left_A, of_A, _ = torch.linalg.svd(R_AR, full_matrices=False)
    left_B, of_B, _ = torch.linalg.svd(R_BR, full_matrices=False)
    K = _counted(S_K)
    return Directions(U_OK=Q_OB @ P[:, :K], S_K=S_K[:K], V_IK=Q_IA @ Q[:K].t(),
                      A_IK=Q_IA @ left_A[:, :_counted(of_A)], B_OK=Q_OB @ left_B[:, :_counted(of_B)])


def site_spectrum(factors: Factors, S_K: Tensor) -> SiteSpectrum:
    """The figures of a site from the singular values of its ΔW."""
    values = S_K.tolist()
    square, largest = sum(value**2 for value in values), max(values, default=0.0)
    return SiteSpectrum(
        site=factors.site, kind=factors.kind, layer=factors.layer, shape=factors.shape, rank=factors.rank,
        parameters=factors.A_RI.numel() + factors.B_OR.numel(), frobenius=math.sqrt(square), spectral=largest,
        stable_rank=square / largest**2 if largest else 0.0, effective_rank=effective_rank(values),
        singular_values=tuple(values))


def effective_rank(values: list[float]) -> float:
    """exp(-Σ p ln p) of p = σ/Σσ; 0 where all are zero."""
    total = sum(values)
    shares = [value / total for value in values if value > 0] if total else []
    return math.exp(-sum(share * math.log(share) for share in shares)) if shares else 0.0


def _counted(S: Tensor) -> int:
    """How many singular values are not negligible."""
    return int((NEGLIGIBLE * S[0] < S).sum()) if S.numel() and float(S[0]) > 0 else 0
