"""How much two sets of directions have in common (Hu et al. 2021, eq. 4 and appendix G).

    φ(i, j) = ‖U_iᵀ V_j‖_F² / min(i, j)         of the first i and the first j directions, in [0, 1]

1 where one span contains the other, 0 where they are orthogonal. With the p = min(i, j) singular values σ of U_iᵀ V_j,
the projection metric is d² = p - Σσ² and so φ = Σσ²/p = 1 - d²/p (the paper prints (1/p)(1 - d²), which does not
follow from its definitions). The geodesic distance on the Grassmannian is √Σθ² with the principal angles θ = arccos σ.
"""

from __future__ import annotations

import torch
from torch import Tensor


def subspace_similarity(U_DI: Tensor, V_DJ: Tensor) -> Tensor:
    """φ(i, j) for all i ≤ I and j ≤ J at once, as an (I, J) matrix; both have orthonormal columns.

    ‖U_iᵀ V_j‖_F² is the sum of the squares of the upper left i × j part of UᵀV, so two running sums give them all.
    """
    squares_IJ = (U_DI.t() @ V_DJ).square()
    i, j = (torch.arange(1, n + 1, dtype=squares_IJ.dtype, device=squares_IJ.device) for n in squares_IJ.shape)
    phi_IJ: Tensor = squares_IJ.cumsum(0).cumsum(1) / torch.minimum(i[:, None], j)
    return phi_IJ


def expected_at_random(i: int, j: int, dimension: int) -> float:
    """The mean of φ(i, j) for two random spans in D dimensions: i·j/D over min(i, j), which is max(i, j)/D."""
    return max(i, j) / dimension


def random_frame(dimension: int, count: int, generator: torch.Generator) -> Tensor:
    """Orthonormal columns whose span is uniformly random: those of a Gaussian matrix; float64, (D, count)."""
    drawn = torch.randn(dimension, min(count, dimension), generator=generator, dtype=torch.float64)
    frame: Tensor = torch.linalg.qr(drawn)[0]
    return frame


def random_similarity(dimension: int, i: int, j: int, generator: torch.Generator) -> Tensor:
    """φ of two random Gaussian matrices with i and j directions: how "nothing in common" looks (Fig. 4, right)."""
    return subspace_similarity(random_frame(dimension, i, generator), random_frame(dimension, j, generator))


def principal_cosines(U_DI: Tensor, V_DJ: Tensor) -> Tensor:
    """The cosines of the principal angles of two spans, largest first; min(I, J) of them."""
    cosines: Tensor = torch.linalg.svdvals(U_DI.t() @ V_DJ).clamp(max=1.0)
    return cosines


def grassmann_distance(U_DI: Tensor, V_DJ: Tensor) -> float:
    """√Σθ² over the principal angles of two spans: 0 where one contains the other, at most (π/2)·√min(I, J)."""
    return float(principal_cosines(U_DI, V_DJ).arccos().square().sum().sqrt())
