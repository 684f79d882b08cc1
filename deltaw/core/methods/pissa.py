"""PiSSA and LoftQ: factors that start as what matters most of a weight, or of what packing it lost.

    PiSSA   W = USVᵀ;  s·B₀A₀ = U_R S_R V_Rᵀ, the principal part, is trained, W - s·B₀A₀ is frozen   (Meng et al. 2024)
    QPiSSA  the frozen rest is packed: Q = q(W - s·B₀A₀)                                             (the same, §4)
    LoftQ   T times: Q ← q(W - s·B₀A₀), then s·B₀A₀ ← the principal part of W - Q, from 0     (Li et al. 2023, alg. 1)

The factors share a part's singular values evenly: B₀ = U_R √(S_R/s), A₀ = √(S_R/s) V_Rᵀ. Both methods would change the
base. Here the base stays as it is, and an adapter is the change to it from the start on, s·(BA - B₀A₀): the same
network, with the same gradients, and a file that is right over the base itself. It has twice the rank (`joined`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from deltaw.core.geometry import Geometry
from deltaw.core.methods.lora import delta_weight

_OVERSAMPLED = 10
"""More directions than asked for that a randomized SVD follows (Halko et al. 2011, §4.2)."""


class HasValues(Protocol):
    """A packed weight."""

    def values(self) -> Tensor:
        """The weight as it is computed with."""


P = TypeVar("P", bound=HasValues)


def principal(W: Tensor, geometry: Geometry, rank: int, scale: float, *, iterations: int | None = None,
              generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """A and B of this rank with s·BA the best approximation of W in the Frobenius norm, in float32 or wider.

    With `iterations` the SVD is a randomized one with that many power iterations, faster and nearly as good.
    """
    wide = W.detach().to(torch.promote_types(W.dtype, torch.float32))
    pairs = [_principal(matrix, rank, scale, iterations, generator) for matrix in matrices(wide, geometry)]
    return assemble(pairs, geometry)


def loftq(W: Tensor, geometry: Geometry, rank: int, scale: float, pack: Callable[[Tensor], P], *,
          iterations: int) -> tuple[P, Tensor, Tensor]:
    """Q, A and B by LoftQ's alternation: W ≈ Q + s·BA."""
    packed = pack(W.float())
    A, B = principal(W.float() - packed.values(), geometry, rank, scale)
    for _ in range(iterations - 1):
        packed = pack(W.float() - delta_weight(A, B, scale, geometry))
        A, B = principal(W.float() - packed.values(), geometry, rank, scale)
    return packed, A, B


def matrices(W: Tensor, geometry: Geometry) -> list[Tensor]:
    """The O × I matrices that a weight's change consists of: one, or one for each slice or expert."""
    match geometry.kind:
        case "embedding":
            return [W.t()]
        case "conv":
            return [W.flatten(1)]
        case "parameter" if W.dim() == 3:
            return [matrix.t() if geometry.transposed else matrix for matrix in W]
        case _:
            matrix = W.t() if geometry.transposed else W
            return [matrix[start:stop] for start, stop in geometry.slices] if geometry.slices else [matrix]


def assemble(pairs: list[tuple[Tensor, Tensor]], geometry: Geometry) -> tuple[Tensor, Tensor]:
    """The factors of a geometry from those of each of its matrices."""
    rank = pairs[0][0].shape[0]
    A = torch.cat([A for A, _ in pairs])
    if geometry.experts > 1:
        B = torch.stack([B for _, B in pairs], dim=-1).flatten(1)
    else:
        B = torch.cat([B for _, B in pairs])
    shape_A, shape_B = geometry.factor_shapes(rank)
    return A.reshape(shape_A).contiguous(), B.reshape(shape_B).contiguous()


def joined(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Factors of the sum of both pairs' rank with BA = B₁A₁ + B₂A₂, differentiable."""
    parts = len(geometry.slices or ()) or geometry.experts
    A = torch.cat([A.reshape(parts, -1, *A.shape[1:]) for A, _ in (first, second)], dim=1).flatten(0, 1)
    if geometry.experts == 1:
        return A, torch.cat([first[1], second[1]], dim=1)
    B = torch.cat([B.reshape(B.shape[0], -1, geometry.experts) for _, B in (first, second)], dim=1)
    return A, B.flatten(1)


def _principal(W_OI: Tensor, rank: int, scale: float, iterations: int | None,
               generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    if iterations is None:
        U, S, Vh = torch.linalg.svd(W_OI, full_matrices=False)
    else:
        U, S, Vh = _randomized(W_OI, min(rank + _OVERSAMPLED, *W_OI.shape), iterations, generator)
    root_R = (S[:rank] / scale).sqrt()
    A, B = root_R[:, None] * Vh[:rank], U[:, :rank] * root_R
    missing = rank - root_R.shape[0]  # a weight narrower than the rank: the rest of the factors is zero
    return torch.nn.functional.pad(A, (0, 0, 0, missing)), torch.nn.functional.pad(B, (0, missing))


def _randomized(W: Tensor, width: int, iterations: int, generator: torch.Generator | None) -> tuple[Any, ...]:
    """The largest singular triples by power iteration on a random start."""
    start = torch.randn(W.shape[1], width, dtype=W.dtype, generator=generator).to(W.device)
    Q = torch.linalg.qr(W @ start).Q
    for _ in range(iterations):
        Q = torch.linalg.qr(W @ torch.linalg.qr(W.t() @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(Q.t() @ W, full_matrices=False)
    return Q @ U, S, Vh
