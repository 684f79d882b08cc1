"""Intruder dimensions (Shuttleworth et al. 2024): strong directions of W + ΔW that W does not have.

    y_j, a left singular vector of W + ΔW among its k largest, is an intruder when max_i |cos(y_j, x_i)| < ε

over all left singular vectors x_i of W. Small matrices are decomposed whole. Of a large one no decomposition is needed:
the squared cosines of y with the x_i are the masses of its spectral measure at σ_i², and no point can have more mass
than the Christoffel function allows, 1/Σp_k(λ)² with the measure's orthonormal polynomials p_k. Lanczos started at y
gives these polynomials; 64 steps of it read W 128 times. A y whose bound is below ε is an intruder for certain; of one
that resembles an x_i the bound is the cosine itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltaw.analyse.factors import Factors
from deltaw.analyse.singular import WHOLE, Matrix, largest_singular

_STEPS, _BETWEEN, _SPLIT, _SMALL, _TINY = 64, 24, 1e-2, 1e-6, 1e-30


@dataclass(frozen=True, kw_only=True, slots=True)
class Intruders:
    """The strongest directions of a changed weight beside those of the weight as it was."""

    site: str
    kind: str
    layer: int | None
    cosines: tuple[float, ...]
    """For each of the k largest left singular vectors of W + ΔW, strongest first: its largest |cosine| with one of W's.

    Of a large matrix an upper bound, which is tight where it is large.
    """
    epsilon: float

    @property
    def count(self) -> int:
        """How many of them are intruders."""
        return sum(cosine < self.epsilon for cosine in self.cosines)


def intruders(factors: Factors, W_OI: Tensor, generator: torch.Generator, *, top: int = 10, epsilon: float = 0.5,
              whole: int = WHOLE) -> Intruders:
    """The intruders among the `top` largest directions of W + ΔW; the defaults are PEFT's."""
    tuned = largest_singular(Matrix(W_OI, factors), top, generator, whole=whole)
    if min(W_OI.shape) <= whole:
        X_OK = largest_singular(Matrix(W_OI), min(W_OI.shape), generator, whole=whole).U_OK
        cosines = (X_OK.t() @ tuned.U_OK).abs().amax(0).clamp(max=1.0)
    else:
        cosines = largest_cosines(W_OI, tuned.U_OK)
    return Intruders(site=factors.site, kind=factors.kind, layer=factors.layer, cosines=tuple(cosines.tolist()),
                     epsilon=epsilon)


def largest_cosines(W_OI: Tensor, Y_OK: Tensor) -> Tensor:
    """max_i |cos(y, x_i)| over the left singular vectors x_i of W, for each unit column y; float64, (K,), from above.

    Where W has more rows than columns, y may have a part outside W's range, which no singular vector of W has: a mass
    at λ = 0 that must not count, and blurs the bound near it. For small λ a second measure is taken there, that of Wᵀy
    under WᵀW, which has no such part: its mass m at λ is a squared cosine of m·‖Wᵀy‖²/λ.
    """
    Y_KO = (Y_OK / Y_OK.norm(dim=0)).to(W_OI).t()
    direct = _Measure(W_OI, Y_KO)
    tall = W_OI.shape[0] > W_OI.shape[1]
    largest_K1, points_KP = direct.nodes_KM[:, -1:], direct.points()
    there = points_KP > (_SPLIT if tall else _SMALL) * largest_K1
    found_K = torch.where(there, direct.largest_mass(points_KP), 0.0).amax(1)
    if tall:
        low = _Measure(W_OI.t(), Y_KO @ W_OI)
        points_KP = low.points()
        there = (points_KP > _SMALL * largest_K1) & (points_KP <= _SPLIT * largest_K1)
        masses_KP = low.largest_mass(points_KP) * low.square_K[:, None] / points_KP.clamp(min=_TINY)
        found_K = torch.maximum(found_K, torch.where(there, masses_KP, 0.0).amax(1))
    return found_K.clamp(max=1.0).sqrt()


class _Measure:
    """The spectral measures of M Mᵀ at K vectors of D values, by Lanczos steps that start there."""

    def __init__(self, M_DE: Tensor, start_KD: Tensor) -> None:
        self.square_K = start_KD.double().square().sum(1)
        steps = min(_STEPS, start_KD.shape[1])
        basis_KMD = start_KD.new_zeros(len(start_KD), steps, start_KD.shape[1])
        basis_KMD[:, 0] = start_KD / self.square_K.sqrt().clamp(min=_TINY).to(start_KD)[:, None]
        diagonal, beside = list[Tensor](), list[Tensor]()
        for step in range(1, steps + 1):
            now_KD = basis_KMD[:, step - 1]
            next_KD = (M_DE @ (M_DE.t() @ now_KD.t())).t()
            diagonal.append((now_KD.double() * next_KD.double()).sum(1))
            before_KMD = basis_KMD[:, :step]
            for _ in range(2):  # against all before, twice: what rounding brings back would count as mass of its own
                inner_KM1 = torch.bmm(before_KMD, next_KD[:, :, None])
                next_KD = next_KD - torch.bmm(before_KMD.transpose(1, 2), inner_KM1)[:, :, 0]
            if step < steps:
                beside.append(next_KD.double().norm(dim=1))
                basis_KMD[:, step] = next_KD / beside[-1].clamp(min=_TINY).to(next_KD)[:, None]
        T_KMM = torch.diag_embed(torch.stack(diagonal, 1))
        if beside:
            off_KM = torch.stack(beside, 1)
            T_KMM = T_KMM + torch.diag_embed(off_KM, 1) + torch.diag_embed(off_KM, -1)
        self.nodes_KM, vectors_KMM = torch.linalg.eigh(T_KMM)
        self.first_KM, self.last_KM = vectors_KMM[:, 0], vectors_KMM[:, -1]

    def points(self) -> Tensor:
        """Where to look for the largest mass: at the Ritz values and between them, (K, P)."""
        part = torch.linspace(0, 1, _BETWEEN + 2, dtype=torch.float64)[1:-1]
        gaps_KM1 = (self.nodes_KM[:, 1:] - self.nodes_KM[:, :-1])[:, :, None]
        return torch.cat([self.nodes_KM, (self.nodes_KM[:, :-1, None] + gaps_KM1 * part).flatten(1)], 1)

    def largest_mass(self, points_KP: Tensor) -> Tensor:
        """The most mass that the measure can have at each point, of a whole of 1.

        With the eigenvectors s of the tridiagonal matrix and its eigenvalues θ, 1/Σp_k(x)² is
        (Σ s₁ⱼsₘⱼ/(x - θⱼ))² / Σ (sₘⱼ/(x - θⱼ))², and s₁ⱼ² at θⱼ itself: the polynomials' own recurrence loses all
        digits beside a Ritz value that has converged.
        """
        apart_KPM = points_KP[:, :, None] - self.nodes_KM[:, None]
        nearest_KP1 = apart_KPM.abs().argmin(2, keepdim=True)
        at_node = torch.gather(apart_KPM, 2, nearest_KP1)[:, :, 0] == 0
        resolvent_KPM = self.last_KM[:, None] / torch.where(apart_KPM == 0, 1.0, apart_KPM)
        between = (resolvent_KPM * self.first_KM[:, None]).sum(2).square()
        between = between / resolvent_KPM.square().sum(2).clamp(min=_TINY)
        weights = torch.gather(self.first_KM.square(), 1, nearest_KP1[:, :, 0])
        return torch.where(at_node, weights, between)
