"""Which examples of a packed row are attended to in one call, and how they lie side by side for it.

A call for each of many short examples is mostly overhead. Neighbours of one length lie evenly in the row, and are a
view. Others are copied, each as long as the longest of its call: what follows an example is seen by none of its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise

import torch
from torch import Tensor

CALL_MS, TOKEN_US, PAIR_NS = 0.3, 4.0, 44.0
"""What a call costs, each token and each pair of tokens of an example: measured on two cores for nine heads, forward
and backward. Only their ratios matter."""


@dataclass(frozen=True, slots=True)
class Evenly:
    """Neighbours of one length."""

    part: slice
    """Of the row."""
    length: int

    def taken(self, t: Tensor) -> Tensor:
        """A part of t (1, heads, T, ...) as (examples, heads, length, ...); a view."""
        if self.part.stop - self.part.start == self.length:
            return t[:, :, self.part]
        return t[0, :, self.part].view(t.shape[1], -1, self.length, *t.shape[3:]).transpose(0, 1)


@dataclass(frozen=True, slots=True)
class Padded:
    """Examples of unlike lengths, each followed by copies of its last token; of another's, a NaN would spread."""

    length: int
    """Of the longest."""
    at: Tensor
    """Where in the row each of (examples · length) tokens lies."""
    real: Tensor
    """Which of them are not padding: (tokens,) positions among them."""
    padding: Tensor
    """The others."""

    def taken(self, t: Tensor) -> Tensor:
        """A copy of parts of t (1, heads, T, D) as (examples, heads, length, D)."""
        rows = t[0].transpose(0, 1).index_select(0, self.at)
        return rows.view(-1, self.length, *rows.shape[1:]).transpose(1, 2)

    def cleared(self, t: Tensor) -> Tensor:
        """The same, with zeros for the padding."""
        copied = self.taken(t)
        copied.transpose(1, 2).flatten(0, 1).index_fill_(0, self.padding, 0.0)
        return copied

    def put(self, t_THD: Tensor, copied: Tensor) -> None:
        """Write what belongs to tokens of the row there; `copied` is laid out as `taken` does it."""
        rows = copied.transpose(1, 2).flatten(0, 1)
        t_THD.index_copy_(0, self.at.index_select(0, self.real), rows.index_select(0, self.real))


def evenly(places: Tensor) -> Iterator[Evenly]:
    """Neighbours of one length, in the row's order."""
    for length, spans in groupby(pairwise(places.tolist()), lambda span: span[1] - span[0]):
        edges = [edge for span in spans for edge in span]
        yield Evenly(slice(edges[0], edges[-1]), length)


def together(places: Tensor, longest: int) -> Sequence[Evenly | Padded]:
    """All examples, those in one call for which padding to the longest costs less than calls of their own.

    Those with more than `longest` tokens have a call each.
    """
    return _together(tuple(places.tolist()), longest)


@lru_cache(maxsize=8)  # each layer of a model asks for the same
def _together(places: tuple[int, ...], longest: int) -> Sequence[Evenly | Padded]:
    spans = sorted(pairwise(places), key=lambda span: span[0] - span[1])
    found: list[Evenly | Padded] = []
    while spans:
        longest_here = spans[0][1] - spans[0][0]
        count, waste = 1, 0.0
        for a, b in spans[1:]:
            waste += _cost(longest_here) - _cost(b - a)
            if longest_here > longest or waste > CALL_MS * count:
                break
            count += 1
        some, spans = sorted(spans[:count]), spans[count:]
        like = all(b - a == longest_here for a, b in some) and all(p[1] == q[0] for p, q in pairwise(some))
        found.append(Evenly(slice(some[0][0], some[-1][1]), longest_here) if like else _padded(some, longest_here))
    return found


def _padded(spans: Sequence[tuple[int, int]], length: int) -> Padded:
    starts, ends = torch.tensor(spans).unsqueeze(-1).unbind(1)
    at = starts + torch.arange(length)
    is_real = (at < ends).flatten()
    return Padded(length, torch.minimum(at, ends - 1).flatten(), is_real.nonzero().squeeze(1),
                  (~is_real).nonzero().squeeze(1))


def _cost(length: int) -> float:
    return 1e-3 * TOKEN_US * length + 1e-6 * PAIR_NS * length * length
