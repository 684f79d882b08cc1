"""Where trained tokens stand among a row's own, as plain index arithmetic.

    [prefix][tokens before the end of the prompt][infix][the other tokens]

Padding keeps its place among the tokens, on whichever side it is. T counts a row's own tokens, V the trained ones,
S = T + V all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

_ends: ContextVar[Tensor | None] = ContextVar("prompt_ends", default=None)


@contextmanager
def prompt_ends(ends_B: Tensor) -> Iterator[None]:
    """Where the prompt of each row ends, in tokens, for the forward passes in the block: what follows is the answer.

    Without it every token of a row belongs to the prompt.
    """
    token = _ends.set(ends_B)
    try:
        yield
    finally:
        _ends.reset(token)


def ends_of(mask_BT: Tensor) -> Tensor:
    """The end of each row's prompt (B,): the one that was told, else the end of its tokens."""
    told = _ends.get()
    if told is not None:
        return told.to(mask_BT.device)
    at = torch.arange(1, mask_BT.shape[1] + 1, device=mask_BT.device)
    return (mask_BT.ne(0) * at).amax(1)


@dataclass(frozen=True, slots=True)
class Layout:
    """The order of one batch."""

    source_BS: Tensor
    """At each place, which of [the row's T tokens, the V trained ones] stands there."""
    back_BT: Tensor
    """At each token of its own, the place whose hidden state stands for it after the last layer."""

    def spread(self, own_BT: Tensor, trained: float) -> Tensor:
        """A row's numbers with `trained` at the trained tokens; (B, S)."""
        V = self.source_BS.shape[1] - own_BT.shape[1]
        filled = own_BT.new_full((len(own_BT), V), trained)
        return torch.cat([own_BT, filled], 1).gather(1, self.source_BS)

    def join(self, own_BTI: Tensor, trained_VI: Tensor) -> Tensor:
        """A row's vectors with the trained ones at their places; (B, S, I)."""
        both = torch.cat([own_BTI, trained_VI.to(own_BTI.dtype).expand(len(own_BTI), -1, -1)], 1)
        return _pick(both, self.source_BS)

    def overwrite(self, h_BSI: Tensor, trained_VI: Tensor) -> Tensor:
        """The hidden states with those of the trained tokens replaced."""
        S, V = h_BSI.shape[1], len(trained_VI)
        own = self.source_BS < S - V
        at = torch.arange(S, device=h_BSI.device)
        both = torch.cat([h_BSI, trained_VI.to(h_BSI.dtype).expand(len(h_BSI), -1, -1)], 1)
        return _pick(both, torch.where(own, at, self.source_BS + V))

    def strip(self, h_BSI: Tensor) -> Tensor:
        """The hidden states of the row's own tokens; (B, T, I)."""
        return _pick(h_BSI, self.back_BT)


def layout(ends_B: Tensor, tokens: int, prefix: int, infix: int, *, causal: bool) -> Layout:
    """The order of rows of `tokens` tokens whose prompts end at `ends_B`.

    In a `causal` network the last infix token stands for the prompt's last one, since what follows is read from there.
    """
    end = ends_B[:, None]
    t = torch.arange(tokens + prefix + infix, device=ends_B.device)[None] - prefix
    in_infix = (t >= end) & (t < end + infix)
    own = torch.where(t < end, t, t - infix)
    trained = torch.where(t < 0, tokens + prefix + t, tokens + prefix + t - end)
    source = torch.where((t < 0) | in_infix, trained, own)
    t = torch.arange(tokens, device=ends_B.device)[None]
    back = prefix + t + (t >= end) * infix
    if causal and infix:
        back = torch.where(t == end - 1, prefix + end + infix - 1, back)
    return Layout(source, back)


def positions(mask_BS: Tensor) -> Tensor:
    """Position ids that count the tokens that are there."""
    return (mask_BS.long().cumsum(1) - 1).clamp_(min=0)


def _pick(x_BSI: Tensor, at_BT: Tensor) -> Tensor:
    return x_BSI.gather(1, at_BT[..., None].expand(-1, -1, x_BSI.shape[2]))
