"""Two adapters of one base beside each other, site by site, from their factors alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from deltaw.analyse.factors import Factors
from deltaw.analyse.spectrum import Directions
from deltaw.analyse.subspace import expected_at_random, grassmann_distance, subspace_similarity


@dataclass(frozen=True, kw_only=True, slots=True)
class SitePair:
    """What two changes of one site have in common; None where one of the two is zero."""

    site: str
    kind: str
    layer: int | None
    cosine: float | None
    """⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖_F ‖ΔW₂‖_F): 1 the same change, -1 the opposite, 0 unrelated."""
    distance: float | None
    """‖ΔW₁ - ΔW₂‖_F."""
    grassmann: float | None
    """Distance on the Grassmannian between the input spans of the two ΔW, over its largest value: 0 to 1."""
    top_A: float | None
    """φ(1, 1) of the right singular vectors of the two A (the LoRA paper's)."""
    top_input: float | None
    """φ(1, 1) of the input directions of the two ΔW."""
    top_output: float | None
    """φ(1, 1) of the output directions of the two ΔW."""
    whole_input: float | None
    """φ of the whole input spans of the two ΔW."""
    random_input: float
    """What `whole_input` is on average for random spans of these ranks."""


def compare_sites(first: Factors, second: Factors, one: Directions, other: Directions) -> SitePair:
    """The figures of a site that both adapters change; `one` and `other` are the directions of the two ΔW."""
    inner, squares = inner_product(first, second), [float(d.S_K.square().sum()) for d in (one, other)]
    there = min(squares) > 0
    p = min(one.S_K.numel(), other.S_K.numel())
    whole = float(subspace_similarity(one.V_IK, other.V_IK)[-1, -1]) if there else None
    return SitePair(
        site=first.site, kind=first.kind, layer=first.layer,
        cosine=inner / math.sqrt(squares[0] * squares[1]) if there else None,
        distance=math.sqrt(max(0.0, squares[0] + squares[1] - 2 * inner)),
        grassmann=grassmann_distance(one.V_IK, other.V_IK) / (math.pi / 2 * math.sqrt(p)) if there else None,
        top_A=_top(one, other, "A"), top_input=_top(one, other, "input"), top_output=_top(one, other, "output"),
        whole_input=whole,
        random_input=expected_at_random(one.S_K.numel(), other.S_K.numel(), first.shape[1]))


def inner_product(first: Factors, second: Factors) -> float:
    """⟨ΔW₁, ΔW₂⟩ = s₁s₂·tr(A₁ᵀB₁ᵀB₂A₂) = s₁s₂·Σ (B₁ᵀB₂)∘(A₁A₂ᵀ): only R₁ × R₂ matrices are formed."""
    left = first.B_OR.double().t() @ second.B_OR.double()
    right = first.A_RI.double() @ second.A_RI.double().t()
    return first.scale * second.scale * float((left * right).sum())


def _top(one: Directions, other: Directions, side: str) -> float | None:
    """φ(1, 1) = cos² of the angle between the first directions."""
    u, v = one.side(side)[:, :1], other.side(side)[:, :1]
    return float((u.t() @ v).square()) if u.numel() and v.numel() else None
