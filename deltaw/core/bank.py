"""`Bank`: the factors of adapters of one layout, and their gradients, where joint steps read and write them in place.

    values (N, P)       a row for each adapter: all its A end to end, then all its B
    gradients (N, P)    the same places

At a site A of all adapters is a view (N, R, I), and so is the A of sites that follow each other, such as q, k and v, as
(N, 3·R, I): one batched product takes them as they lie. A row is one flat tensor, which an optimizer takes at once. The
parameters are views of the rows; whoever holds them notices nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

Pair = tuple[nn.Parameter, nn.Parameter]
"""A and B of an adapter at one site."""


@dataclass(frozen=True, eq=False, slots=True)
class Place:
    """Where one adapter's factors at one site lie, and their gradients."""

    bank: Bank
    row: int
    factors: Pair
    starts: tuple[int, int]
    """Where A and B begin in the row."""
    gradients: tuple[Tensor, Tensor]

    def add(self, dA: Tensor | None, dB: Tensor | None) -> None:
        """Add to the gradients; None is nothing."""
        for factor, kept, grad in zip(self.factors, self.gradients, (dA, dB), strict=True):
            if grad is not None and factor.grad is None:
                factor.grad = kept.copy_(grad)
            elif grad is not None and factor.grad is not None:
                factor.grad.add_(grad)

    @property
    def is_fresh(self) -> bool:
        """Whether neither factor has a gradient."""
        return self.factors[0].grad is None and self.factors[1].grad is None

    def leave(self) -> None:
        """Give the factors memory of their own again."""
        for factor in self.factors:
            factor.data = factor.data.clone()

    def show(self) -> None:
        """Let the factors have what lies in the gradients' places."""
        self.factors[0].grad, self.factors[1].grad = self.gradients


class Bank:
    """See the module's text. What it is made of stays the parameters' own, only in another place."""

    def __init__(self, adapters: Sequence[Sequence[Pair]]) -> None:
        """A row for each adapter's pairs by site; all adapters have the same shapes, in one dtype on one device."""
        first = adapters[0][0][0]
        sizes = [pair[side].numel() for side in (0, 1) for pair in adapters[0]]
        self.starts = [0, *accumulate(sizes)]
        self.values = torch.empty(len(adapters), self.starts[-1], dtype=first.dtype, device=first.device)
        self.gradients = torch.empty_like(self.values)
        self.places = [self._take_in(row, pairs) for row, pairs in enumerate(adapters)]

    def _take_in(self, row: int, pairs: Sequence[Pair]) -> list[Place]:
        """Move an adapter's tensors into its row."""
        places = []
        for site, factors in enumerate(pairs):
            at = self.starts[site], self.starts[len(pairs) + site]
            grads = []
            for factor, start in zip(factors, at, strict=True):
                span = slice(start, start + factor.numel())
                factor.data = self.values[row, span].view(factor.shape).copy_(factor.data)
                factor.grad = None
                grads.append(self.gradients[row, span].view(factor.shape))
            places.append(Place(self, row, factors, at, (grads[0], grads[1])))
        return places

    def stack(self, tensor: Tensor, rows: slice, start: int, shape: tuple[int, int]) -> Tensor:
        """What lies at one place of some rows of `values` or `gradients`, as a view (N, *shape)."""
        return tensor[rows, start:start + shape[0] * shape[1]].view(rows.stop - rows.start, *shape)
