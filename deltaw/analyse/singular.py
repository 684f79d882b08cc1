"""The largest singular values and vectors of a base weight, or of W + ΔW, without a whole decomposition.

Small matrices: the eigenvectors of the Gram matrix of the shorter side, in float64. Large ones: block Krylov iteration
(Musco & Musco 2015), which reads W a few dozen times in its own precision and stops when the residual says so:
‖Mᵀu - σv‖ ≤ tolerance·σ₁ for every pair. ΔW stays in its factors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltaw.analyse.factors import Factors

WHOLE = 1024
"""Shorter sides up to this are decomposed whole."""
TOLERANCE = 1e-4
"""Residual of a singular pair over the largest singular value."""
_EXTRA, _MOST, _TINY = 8, 2048, 1e-300


@dataclass(frozen=True, eq=False, slots=True)
class Matrix:
    """W, or W + s·B A where a change is given; W_OI is in matrix view, float32 or wider."""

    W_OI: Tensor
    change: Factors | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.W_OI.shape[0], self.W_OI.shape[1]

    def times(self, x_IK: Tensor) -> Tensor:
        """M x, of shape (O, K)."""
        y_OK = self.W_OI @ x_IK
        if self.change is None:
            return y_OK
        A, B = self.change.A_RI.to(y_OK), self.change.B_OR.to(y_OK)
        return torch.addmm(y_OK, B, A @ x_IK, alpha=self.change.scale)

    def t_times(self, y_OK: Tensor) -> Tensor:
        """Mᵀ y, of shape (I, K)."""
        x_IK = self.W_OI.t() @ y_OK
        if self.change is None:
            return x_IK
        A, B = self.change.A_RI.to(x_IK), self.change.B_OR.to(x_IK)
        return torch.addmm(x_IK, A.t(), B.t() @ y_OK, alpha=self.change.scale)

    def dense(self) -> Tensor:
        """The matrix itself, in float64; for small ones."""
        W = self.W_OI.double()
        if self.change is None:
            return W
        return torch.addmm(W, self.change.B_OR.double(), self.change.A_RI.double(), alpha=self.change.scale)


@dataclass(frozen=True, eq=False, slots=True)
class Singular:
    """The K largest singular triples, float64, columns in falling order."""

    U_OK: Tensor
    S_K: Tensor
    V_IK: Tensor
    residual: float
    """The largest ‖Mᵀu - σv‖ / σ₁ of them: how exact they are."""


def largest_singular(matrix: Matrix, count: int, generator: torch.Generator, *, tolerance: float = TOLERANCE,
                     whole: int = WHOLE) -> Singular:
    """The `count` largest singular triples; all of them where there are fewer."""
    count = min(count, *matrix.shape)
    if min(matrix.shape) <= whole or count > min(matrix.shape) // 2:
        return _of_gram(matrix.dense(), count)
    return _krylov(matrix, count, generator, tolerance)


def _of_gram(M_OI: Tensor, count: int) -> Singular:
    """From the eigenvectors of MMᵀ or MᵀM, whichever is smaller."""
    wide = M_OI.shape[0] <= M_OI.shape[1]
    M = M_OI if wide else M_OI.t()
    values, vectors = torch.linalg.eigh(M @ M.t())
    U, S = vectors.flip(1)[:, :count], values.flip(0)[:count].clamp(min=0).sqrt()
    V = _over(M.t() @ U, S)
    return Singular(U, S, V, 0.0) if wide else Singular(V, S, U, 0.0)


def _krylov(matrix: Matrix, count: int, generator: torch.Generator, tolerance: float) -> Singular:
    """Rayleigh-Ritz on the span of Ω, MᵀMΩ, (MᵀM)²Ω, ..., each block orthogonal to those before."""
    I = matrix.shape[1]  # noqa: E741  # inputs
    width = min(count + _EXTRA, I)
    start = torch.randn(I, width, generator=generator, dtype=torch.float64).to(matrix.W_OI)
    basis_IK = torch.linalg.qr(start)[0]
    images = [matrix.times(basis_IK)]
    while True:
        next_IK = matrix.t_times(images[-1])
        for _ in range(2):  # twice is enough
            next_IK = next_IK - basis_IK @ (basis_IK.t() @ next_IK)
        next_IK = torch.linalg.qr(next_IK)[0]
        basis_IK = torch.cat([basis_IK, next_IK], 1)
        images.append(matrix.times(next_IK))
        full = basis_IK.shape[1] + width > min(I, _MOST)
        if len(images) % 3 and not full:
            continue
        found = _ritz(matrix, basis_IK, torch.cat(images, 1), count)
        if full or found.residual <= tolerance:
            return found


def _ritz(matrix: Matrix, basis_IK: Tensor, image_OK: Tensor, count: int) -> Singular:
    values, vectors = torch.linalg.eigh(image_OK.double().t() @ image_OK.double())
    S, small = values.flip(0)[:count].clamp(min=0).sqrt(), vectors.flip(1)[:, :count]
    V = basis_IK.double() @ small
    U = _over(image_OK.double() @ small, S)
    residual = (matrix.t_times(U.to(image_OK)).double() - V * S).norm(dim=0).max() / S[0].clamp(min=_TINY)
    return Singular(U, S, V, float(residual))


def _over(scaled_DK: Tensor, S_K: Tensor) -> Tensor:
    """Singular vectors from σ times themselves; zero where σ is too small to tell the direction."""
    return torch.where(1e-7 * S_K[0] < S_K, scaled_DK / S_K.clamp(min=_TINY), 0.0)
