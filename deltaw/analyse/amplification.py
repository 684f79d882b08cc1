"""ΔW against W (section 7.3 and Table 7 of the LoRA paper).

    amplification = ‖ΔW‖_F / ‖UᵀWV‖_F        U, V: the singular directions of ΔW

The norm of W seen through r directions is given for three choices of them: ΔW's own, W's largest (an upper limit,
√Σσ²), and random ones. In the paper ΔW's directions carry more of W than random ones and far less than its largest:
the change amplifies directions that W has and does not emphasise. (The paper writes UᵀWVᵀ with V's directions in its
rows; here they are columns, so it is UᵀWV.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltaw.analyse.factors import Factors
from deltaw.analyse.singular import Singular
from deltaw.analyse.spectrum import Directions
from deltaw.analyse.subspace import expected_at_random, random_frame, subspace_similarity


@dataclass(frozen=True, kw_only=True, slots=True)
class Amplification:
    """A site's change beside the weight that it changes."""

    site: str
    kind: str
    layer: int | None
    rank: int
    """Directions of ΔW that are not negligible: the r of the three projections."""
    weight: float
    """‖W‖_F."""
    change: float
    """‖ΔW‖_F."""
    through_change: float
    """‖UᵀWV‖_F through ΔW's directions."""
    through_top: float
    """The same through W's r largest directions."""
    through_random: float
    """The same through r random directions on each side."""
    top_overlap: float
    """φ of ΔW's input span and the span of W's largest input directions, as many as `top_count`."""
    top_overlap_random: float
    """The mean of `top_overlap` for a random span."""
    top_count: int
    """How many of W's largest directions were compared with."""

    @property
    def factor(self) -> float:
        """‖ΔW‖_F / ‖UᵀWV‖_F."""
        return self.change / self.through_change if self.through_change else float("inf")

    @property
    def relative(self) -> float:
        """‖ΔW‖_F / ‖W‖_F."""
        return self.change / self.weight if self.weight else float("inf")


def amplification(factors: Factors, directions: Directions, W_OI: Tensor, top: Singular,
                  generator: torch.Generator) -> Amplification | None:
    """The three projections of W at a site; None for ΔW = 0. `top` holds at least as many triples of W as ΔW has."""
    r = directions.S_K.numel()
    if r == 0:
        return None
    U_random, V_random = (random_frame(size, r, generator) for size in factors.shape)
    count = top.V_IK.shape[1]
    return Amplification(
        site=factors.site, kind=factors.kind, layer=factors.layer, rank=r,
        weight=float(torch.linalg.vector_norm(W_OI, dtype=torch.float64)), change=float(directions.S_K.norm()),
        through_change=projected_norm(W_OI, directions.U_OK, directions.V_IK),
        through_top=float(top.S_K[:r].norm()), through_random=projected_norm(W_OI, U_random, V_random),
        top_overlap=float(subspace_similarity(directions.V_IK, top.V_IK)[-1, -1]),
        top_overlap_random=expected_at_random(r, count, factors.shape[1]), top_count=count)


def projected_norm(W_OI: Tensor, U_OK: Tensor, V_IK: Tensor) -> float:
    """‖UᵀWV‖_F; the product with W in W's own precision, at least float32."""
    seen_KI = U_OK.to(W_OI).t() @ W_OI
    return float((seen_KI.double() @ V_IK.double()).norm())
