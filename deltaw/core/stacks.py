"""Low-rank products of equally long segments as batched ones, over factors stacked and padded to the largest rank.

    H = s·(x Aᵀ)      y += H Bᵀ      dH = s·(g B)      dx += dH A,  dA = dHᵀ x,  dB = gᵀ H        for each segment

Neighbours in a bank are stacked already (`BankStacks`): nothing is copied, and their gradients stay there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from deltaw.core.bank import Place

Pairs = Sequence[Sequence[tuple[int, float]]]
"""For each segment the projections that its adapter changes, with their scales."""

_VECTOR = 16
"""Numbers of float32 in a vector register of 512 bits."""


class Stacks:
    """Factors of N segments over P projections of one input: A (N, P·R, I), and B (N, O, R) of each projection."""

    def __init__(self, pairs: Pairs, outputs: Sequence[int], factors: Sequence[Tensor], dtype: torch.dtype) -> None:
        """`factors` are A, B of each segment's projections in turn."""
        self.pairs, self.outputs, self.count = pairs, outputs, len(pairs)
        self.ranks = [A.shape[0] for A in factors[::2]]
        self.width = max(self.ranks)
        self.own_dtype = factors[0].dtype
        A, B = factors[0::2], factors[1::2]
        projections = len(outputs)
        self.full = len(A) == self.count * projections and min(self.ranks) == self.width
        """Whether nothing is padded: every segment has every projection, all of one rank."""
        if self.full:  # converted as stacks: a thousand factors in a pass would be a thousand conversions
            self.A_NPRI = torch.cat(list(A)).to(dtype).view(self.count, projections * self.width, -1)
            self.B = [torch.stack(list(B[i::projections])).to(dtype) for i in range(projections)]
        else:
            self.A_NPRI, self.B = self._padded(A, B, dtype)
        scales = [scale for part in pairs for _, scale in part]
        self.scale: float | Tensor = scales[0] if len(set(scales)) == 1 else self._by_column()

    def _padded(self, A: Sequence[Tensor], B: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """Stacks of zeros with the factors in their places, which the copying converts."""
        A_NPRI = A[0].new_zeros(self.count, len(self.outputs) * self.width, A[0].shape[1], dtype=dtype)
        B_NOR = [B[0].new_zeros(self.count, outputs, self.width, dtype=dtype) for outputs in self.outputs]
        for n, i, _, at in self._places():
            first = i * self.width
            A_NPRI[n, first:first + self.ranks[at]] = A[at]
            B_NOR[i][n, :, :self.ranks[at]] = B[at]
        return A_NPRI, B_NOR

    def _by_column(self) -> Tensor:
        """The scales (N, 1, P·R) of the columns of H."""
        scales = [[0.0] * len(self.outputs) for _ in self.pairs]
        for n, i, scale, _ in self._places():
            scales[n][i] = scale
        return self.A_NPRI.new_tensor(scales).repeat_interleave(self.width, 1).unsqueeze(1)

    def _places(self) -> Iterator[tuple[int, int, float, int]]:
        """Segment, projection, scale and number of each pair of factors."""
        at = 0
        for n, part in enumerate(self.pairs):
            for i, scale in part:
                yield n, i, scale, at
                at += 1

    def forward(self, x_TI: Tensor, y: Sequence[Tensor]) -> Tensor:
        """Add every change to y in place; returns H (N, S, P·R)."""
        h_NSR = _narrow(self._by_segment(x_TI), self.A_NPRI).mul_(self.scale)
        for y_TO, h, B_NOR in zip(y, torch.split(h_NSR, self.width, 2), self.B, strict=True):
            self._by_segment(y_TO).baddbmm_(h, B_NOR.transpose(1, 2))
        return h_NSR

    def backward(self, x_TI: Tensor, h_NSR: Tensor, g: Sequence[Tensor | None],
                 dx_TI: Tensor | None) -> list[Tensor | None]:
        """dA and dB of every pair in turn; what reaches x is added to `dx_TI`."""
        g_N, H = self._segments(g), torch.split(h_NSR, self.width, 2)
        dh_NSR = self._through(g_N, H, dx_TI)
        dA_NRI = torch.bmm(dh_NSR.transpose(1, 2), self._by_segment(x_TI))
        dB = [None if g_NSO is None else torch.bmm(g_NSO.transpose(1, 2), h) for g_NSO, h in zip(g_N, H, strict=True)]
        return self._each(dA_NRI, dB)

    def _through(self, g_N: Sequence[Tensor | None], H: Sequence[Tensor], dx_TI: Tensor | None) -> Tensor:
        """dH (N, S, P·R); what reaches x is added to `dx_TI`."""
        dh_NSR = torch.cat([torch.zeros_like(h) if g_NSO is None else torch.bmm(g_NSO, B_NOR)
                            for g_NSO, h, B_NOR in zip(g_N, H, self.B, strict=True)], 2).mul_(self.scale)
        if dx_TI is not None:
            self._by_segment(dx_TI).baddbmm_(dh_NSR, self.A_NPRI)
        return dh_NSR

    def _each(self, dA_NRI: Tensor, dB: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients pair by pair, without what is padded, in the factors' dtype."""
        dA_NRI = dA_NRI.to(self.own_dtype)
        dB = [None if dB_NOR is None else dB_NOR.to(self.own_dtype) for dB_NOR in dB]
        if self.full:  # with a thousand pairs in a step it tells whether Python cuts them or torch does
            of_B = [[None] * self.count if dB_NOR is None else dB_NOR.unbind() for dB_NOR in dB]
            of_A = dA_NRI.view(self.count * len(dB), self.width, -1).unbind()
            of_both = zip(of_A, (dB_OR for part in zip(*of_B, strict=True) for dB_OR in part), strict=True)
            return [grad for dA, dB_OR in of_both for grad in ((None, None) if dB_OR is None else (dA, dB_OR))]
        grads: list[Tensor | None] = []
        for n, i, _, at in self._places():
            dB_NOR, rank, first = dB[i], self.ranks[at], i * self.width
            grads += (None, None) if dB_NOR is None else (dA_NRI[n, first:first + rank], dB_NOR[n, :, :rank])
        return grads

    def _segments(self, g: Sequence[Tensor | None]) -> list[Tensor | None]:
        return [None if g_TO is None else self._by_segment(g_TO) for g_TO in g]

    def _by_segment(self, rows: Tensor) -> Tensor:
        """(T, ...) as (N, S, ...)."""
        return rows.view(self.count, -1, rows.shape[1])


class BankStacks(Stacks):
    """Neighbouring rows of one bank, whose adapters change the same projections at one rank."""

    def __init__(self, places: Sequence[Sequence[Place]], pairs: Pairs, dtype: torch.dtype) -> None:
        """`places` are those of each segment's projections, `pairs` as they are for `Stacks`."""
        first = places[0]
        self.places, self.pairs, self.count, self.full = places, pairs, len(places), True
        self.bank, self.rows = first[0].bank, slice(first[0].row, first[0].row + len(places))
        self.which = [i for i, _ in pairs[0]]
        """The projections that are changed."""
        self.width, self.own_dtype = first[0].factors[0].shape[0], first[0].factors[0].dtype
        self.ranks = [self.width] * (self.count * len(first))
        self.outputs = [place.factors[1].shape[0] for place in first]
        self.A_NPRI = self._A(self.bank.values).to(dtype)
        self.B = [B_NOR.to(dtype) for B_NOR in self._B(self.bank.values)]
        scales = [[scale for _, scale in part] for part in pairs]
        alike = all(scale == scales[0][0] for part in scales for scale in part)
        self.scale = scales[0][0] if alike else \
            self.A_NPRI.new_tensor(scales).repeat_interleave(self.width, 1).unsqueeze(1)

    @staticmethod
    def fits(places: Sequence[Place]) -> bool:
        """Whether the places of one adapter's projections can be taken as one: of one rank, A after A."""
        A = [place.factors[0] for place in places]
        ends = [place.starts[0] + a.numel() for place, a in zip(places, A, strict=True)]
        return len({a.shape for a in A}) == 1 and all(
            end == place.starts[0] for end, place in zip(ends, places[1:], strict=False))

    def _A(self, tensor: Tensor) -> Tensor:
        """A (N, P·R, I), or its gradient."""
        A_RI, rank = self.places[0][0].factors[0], self.width * len(self.outputs)
        return self.bank.stack(tensor, self.rows, self.places[0][0].starts[0], (rank, A_RI.shape[1]))

    def _B(self, tensor: Tensor) -> list[Tensor]:
        """B (N, O, R) of each projection, or its gradient."""
        return [self.bank.stack(tensor, self.rows, place.starts[1], (outputs, self.width))
                for place, outputs in zip(self.places[0], self.outputs, strict=True)]

    def forward(self, x_TI: Tensor, y: Sequence[Tensor]) -> Tensor:
        """As `Stacks.forward`, for the outputs of all projections."""
        return super().forward(x_TI, [y[i] for i in self.which])

    def backward(self, x_TI: Tensor, h_NSR: Tensor, g: Sequence[Tensor | None],
                 dx_TI: Tensor | None) -> list[Tensor | None]:
        """Add every gradient where it is kept; there is nothing to hand on."""
        g = [g[i] for i in self.which]
        if any(g_TO is None for g_TO in g) or not all(place.is_fresh for part in self.places for place in part):
            found = super().backward(x_TI, h_NSR, g, dx_TI)
            for at, place in enumerate(place for part in self.places for place in part):
                place.add(*found[2 * at:2 * at + 2])
            return []
        g_N, H = self._segments(g), torch.split(h_NSR, self.width, 2)
        dh_NSR = self._through(g_N, H, dx_TI)
        _write(dh_NSR.transpose(1, 2), self._by_segment(x_TI), self._A(self.bank.gradients))
        for g_NSO, h, dB_NOR in zip(g_N, H, self._B(self.bank.gradients), strict=True):
            assert g_NSO is not None
            _write(g_NSO.transpose(1, 2), h, dB_NOR)
        for part in self.places:
            for place in part:
                place.show()
        return []


def _narrow(x_NSI: Tensor, A_NRI: Tensor) -> Tensor:
    """x Aᵀ (N, S, R), by the product whose rows fill a processor's vectors; that is up to four times as fast."""
    if x_NSI.device.type == "cpu" and (A_NRI.shape[1] < _VECTOR or x_NSI.shape[1] <= _VECTOR):
        return torch.bmm(A_NRI, x_NSI.transpose(1, 2)).transpose(1, 2)
    return torch.bmm(x_NSI, A_NRI.transpose(1, 2))


def _write(left: Tensor, right: Tensor, out: Tensor) -> None:
    """A batched product into memory that is there, in whatever format that has."""
    if left.dtype == out.dtype:
        torch.bmm(left, right, out=out)
    else:
        out.copy_(torch.bmm(left, right))
