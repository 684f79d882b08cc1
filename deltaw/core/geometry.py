"""`Geometry`: how one weight of the base is seen as a matrix, and what shapes the factors of its change have.

    kind       base weight                    A                B                 in PEFT's file
    linear     (O, I), or (I, O) transposed   (R, I)           (O, R)            the same
    attention  (O, I), a projection of MHA    (R, I)           (O, R)            the same
    embedding  (V, D)                         (R, V)           (D, R)            the same
    conv       (O, I/groups, k...)            (R, I/groups, k...)  (O, R, 1...)  A made dense where groups > 1
    parameter  (O, I), (E, O, I), (E, I, O)   (E·R, I)         (O, R·E)          the same
    bias       (O,)                           one tensor, the whole trained bias
    saved      any                            a full copy of the module's tensors

With `slices`, only those output ranges of a linear weight change: part j has R rows of A and its own rows of B, so
that A is (n·R, I) and B is (ΣOⱼ, R); the file holds B spread out to (O, n·R) with zeros elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["linear", "attention", "embedding", "conv", "parameter", "bias", "saved"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """The shape of a base weight and how to read it as an O × I matrix."""

    kind: Kind
    shape: tuple[int, ...]
    """Shape of the base weight in its own layout."""
    transposed: bool = False
    """The weight is stored inputs first: transformers' `Conv1D`, or experts of (E, I, O)."""
    groups: int = 1
    """Groups of a convolution."""
    slices: tuple[tuple[int, int], ...] | None = None
    """Ranges [start, stop) of outputs that change; None is all."""

    @property
    def experts(self) -> int:
        """Number of stacked matrices E: the first size of a 3-D parameter, else 1."""
        return self.shape[0] if self.kind == "parameter" and len(self.shape) == 3 else 1

    @property
    def out_features(self) -> int:
        """O, the rows of the matrix view."""
        if self.kind == "embedding":
            return self.shape[1]
        last = self.shape[-2:] if self.kind == "parameter" else self.shape
        return last[1] if self.transposed else last[0]

    @property
    def in_features(self) -> int:
        """I, the columns of the matrix view; for a convolution, I/groups times the kernel's size."""
        if self.kind == "embedding":
            return self.shape[0]
        if self.kind == "conv":
            return math.prod(self.shape[1:])
        last = self.shape[-2:] if self.kind == "parameter" else self.shape
        return last[0] if self.transposed else last[1]

    @property
    def max_rank(self) -> int:
        """The rank above which ΔW gains nothing: min(I, O), of the narrowest slice."""
        out = min((stop - start for start, stop in self.slices), default=0) if self.slices else self.out_features
        return min(self.in_features, out)

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B at this rank."""
        I, O = self.in_features, self.out_features  # noqa: E741
        if self.kind == "conv":
            ones = (1,) * (len(self.shape) - 2)
            return (rank, *self.shape[1:]), (O, rank, *ones)
        if self.slices:
            return (len(self.slices) * rank, I), (sum(b - a for a, b in self.slices), rank)
        return (self.experts * rank, I), (O, self.experts * rank)

    def rank_of(self, A: Tensor, B: Tensor) -> int:
        """The rank of factors that fit this geometry."""
        if self.slices:
            return B.shape[1]
        return A.shape[0] // self.experts

    def count(self, rank: int) -> int:
        """Number of trained values at this rank."""
        if self.kind in ("bias", "saved"):
            return math.prod(self.shape)
        A, B = self.factor_shapes(rank)
        return math.prod(A) + math.prod(B)

    def is_dense_grouped(self, A: Tensor) -> bool:
        """Whether A reads all input channels although the base is grouped, as PEFT's does: it cannot be merged."""
        return self.kind == "conv" and self.groups > 1 and A.shape[1] != self.shape[1]

    def fits(self, A: Tensor, B: Tensor) -> bool:
        """Whether these factors belong to this geometry at some rank."""
        if self.is_dense_grouped(A):
            return (A.shape[1] == self.shape[1] * self.groups and A.shape[2:] == self.shape[2:]
                    and B.shape[0] == self.shape[0] and B.shape[1] * self.groups == A.shape[0])
        return (tuple(A.shape), tuple(B.shape)) == self.factor_shapes(self.rank_of(A, B))

    def dense_out(self, B: Tensor) -> Tensor:
        """B as (O, n·R): itself, or with each slice's rows in their place and zeros elsewhere (differentiable)."""
        if not self.slices:
            return B
        rank, parts = B.shape[1], len(self.slices)
        rows, position, row = [], 0, 0
        for j, (start, stop) in enumerate(self.slices):
            rows.append(B.new_zeros(start - position, parts * rank))
            block = B[row:row + stop - start]
            rows.append(torch.nn.functional.pad(block, (j * rank, (parts - 1 - j) * rank)))
            position, row = stop, row + stop - start
        rows.append(B.new_zeros(self.out_features - position, parts * rank))
        return torch.cat(rows)

    def compact_out(self, dense_B: Tensor) -> Tensor | None:
        """The inverse of `dense_out`, or None where the zeros are not zero."""
        if not self.slices:
            return dense_B
        rank = dense_B.shape[1] // len(self.slices)
        B = torch.cat([dense_B[a:b, j * rank:(j + 1) * rank] for j, (a, b) in enumerate(self.slices)])
        return B if torch.equal(self.dense_out(B), dense_B) else None
