"""Keys and values of all running sequences, and attention over them when a batch is one row of tokens.

The tokens of a step lie end to end in one row: no padding, and layers other than attention do not notice. A place of
the cache has room for one sequence of full length. On a CPU, memory that was never written costs nothing, so that
places are as good as blocks there; on a GPU their number times their length is what is reserved.

Attention of tokens that are alone in their sequence (everybody who writes) runs in one call, over the stretch of places
they are in, up to the longest of them. Where lengths differ so much that most of that would be masked, and for the
tokens of prompts, each sequence runs by itself over exactly its own keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MASKED_SHARE = 3
"""Run sequences apart where together means this many times the keys."""
_names = count()


class UnknownAttention(Exception):
    """The model's attention does something that is not known here."""


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens `a` to before `b` of the row, which end at position `end` of the sequence in `place`."""

    a: int
    b: int
    place: int
    end: int


@dataclass(slots=True)
class Layout:
    """Where the tokens of a row belong. The first `single` of them are alone in their sequence."""

    slots_T: Tensor
    spans: list[Span]
    single: int
    first: int = 0
    last: int = 0
    longest: int = 0
    lengths_P: Tensor | None = None
    """Lengths of the places `first` to `last`; 1 where a place has no token in this row."""
    order_B: Tensor | None = None
    """Which of those places each single token is in; None where they are all of them in order."""


class RaggedCache:
    """The cache of one model, and the attention function that the model is given."""

    def __init__(self, places: int, capacity: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.places, self.capacity, self.dtype, self.device = places, capacity, dtype, device
        self.layout: Layout | None = None
        self.name = f"deltaw_serve_{next(_names)}"
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._masks: dict[tuple[object, ...], Tensor] = {}

    def register(self, model: Any) -> None:
        """Make the model attend through this cache."""
        from transformers import AttentionInterface, AttentionMaskInterface

        AttentionInterface.register(self.name, self.attend)
        AttentionMaskInterface.register(self.name, lambda *args, **kwargs: None)
        model.set_attn_implementation(self.name)

    # -- before a step -----------------------------------------------------------------------------------------------

    def lay_out(self, spans: Sequence[Span]) -> None:
        """Say where the tokens of the next row belong; spans of one token come first."""
        single = next((i for i, span in enumerate(spans) if span.b - span.a > 1), len(spans))
        slots = [span.place * self.capacity + span.end - (span.b - at) for span in spans
                 for at in range(span.a, span.b)]
        alone = spans[:single]
        together = len(alone) > 1 and _worth_it(alone)
        layout = Layout(torch.tensor(slots, device=self.device), list(spans[single if together else 0:]),
                        single if together else 0)
        if together:
            layout.first, layout.last = min(s.place for s in alone), max(s.place for s in alone)
            layout.longest = max(s.end for s in alone)
            lengths = dict.fromkeys(range(layout.first, layout.last + 1), 1) | {s.place: s.end for s in alone}
            layout.lengths_P = torch.tensor(list(lengths.values()), device=self.device)
            order = [span.place - layout.first for span in alone]
            if order != list(range(len(lengths))):
                layout.order_B = torch.tensor(order, device=self.device)
        self.layout = layout
        self._masks = {}

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first keys and values of one place to another."""
        a, b = source * self.capacity, target * self.capacity
        for held in (*self._keys.values(), *self._values.values()):
            held[b:b + length] = held[a:a + length]

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return sum(held.nbytes for held in (*self._keys.values(), *self._values.values()))

    # -- in the model's forward --------------------------------------------------------------------------------------

    def attend(self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor,
               attention_mask: Tensor | None, dropout: float = 0.0, scaling: float | None = None,
               **kwargs: Any) -> tuple[Tensor, None]:
        """Attention of queries (1, H, T, D) with new keys and values (1, G, T, D); gives (1, T, H, D)."""
        layout = self.layout
        if layout is None or kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
            raise UnknownAttention
        keys, values = self._store(getattr(module, "layer_idx"), key, value, layout)  # noqa: B009  # not a Module's own
        window = kwargs.get("sliding_window")
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        q_THD = query[0].transpose(0, 1)
        parts = [self._together(q_THD[:layout.single], keys, values, layout, scale, window)] if layout.single else []
        parts += [self._apart(q_THD[span.a:span.b], keys, values, span, scale, window) for span in layout.spans]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).unsqueeze(0), None

    def _store(self, layer: int, key: Tensor, value: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        if layer not in self._keys:
            for held, new in ((self._keys, key), (self._values, value)):
                shape = self.places * self.capacity, new.shape[1], new.shape[3]
                held[layer] = torch.zeros(shape, dtype=new.dtype, device=new.device)
        keys, values = self._keys[layer], self._values[layer]
        keys.index_copy_(0, layout.slots_T, key[0].transpose(0, 1))
        values.index_copy_(0, layout.slots_T, value[0].transpose(0, 1))
        return keys, values

    def _together(self, q_BHD: Tensor, keys: Tensor, values: Tensor, layout: Layout, scale: float,
                  window: int | None) -> Tensor:
        """All single tokens in one call, each with the group of heads that share a key as its queries."""
        rows, groups = layout.last + 1 - layout.first, keys.shape[1]
        if layout.order_B is not None:
            q_BHD = q_BHD.new_zeros(rows, *q_BHD.shape[1:]).index_copy_(0, layout.order_B, q_BHD)
        q_PGRD = q_BHD.reshape(rows, groups, -1, q_BHD.shape[-1])
        k_PGLD, v_PGLD = (held.view(self.places, self.capacity, groups, -1)[
            layout.first:layout.last + 1, :layout.longest].transpose(1, 2) for held in (keys, values))
        out = F.scaled_dot_product_attention(q_PGRD, k_PGLD, v_PGLD, self._length_mask(layout, window), scale=scale)
        out_BHD = out.flatten(1, 2)
        return out_BHD if layout.order_B is None else out_BHD.index_select(0, layout.order_B)

    def _apart(self, q_THD: Tensor, keys: Tensor, values: Tensor, span: Span, scale: float,
               window: int | None) -> Tensor:
        """The tokens of one sequence over its own keys."""
        start = span.place * self.capacity
        k_GLD, v_GLD = (held[start:start + span.end].transpose(0, 1) for held in (keys, values))
        length = span.b - span.a
        if length == 1 and not (window and span.end > window):
            q_GRD = q_THD[0].reshape(k_GLD.shape[0], -1, q_THD.shape[-1])
            out = F.scaled_dot_product_attention(q_GRD[None], k_GLD[None], v_GLD[None], scale=scale)
            return out.flatten(1, 2)
        fresh = length == span.end and not (window and length > window)
        mask = None if fresh else self._causal_mask(length, span.end, window)
        out = F.scaled_dot_product_attention(q_THD.transpose(0, 1)[None], k_GLD[None], v_GLD[None], mask,
                                             is_causal=fresh, scale=scale, enable_gqa=k_GLD.shape[0] != q_THD.shape[1])
        return out[0].transpose(0, 1)

    # -- masks, the same for all layers of a step --------------------------------------------------------------------

    def _length_mask(self, layout: Layout, window: int | None) -> Tensor:
        """(P, 1, 1, L): which keys of its place a single token sees."""
        if ("length", window) not in self._masks:
            assert layout.lengths_P is not None
            at, lengths = torch.arange(layout.longest, device=self.device), layout.lengths_P[:, None]
            seen = at < lengths
            if window:
                seen &= at >= lengths - window
            self._masks["length", window] = seen[:, None, None]
        return self._masks["length", window]

    def _causal_mask(self, length: int, end: int, window: int | None) -> Tensor:
        """(T, L): which keys the last `length` of `end` tokens see."""
        if (length, end, window) not in self._masks:
            back = torch.arange(end - length, end, device=self.device)[:, None] - torch.arange(end, device=self.device)
            seen = back >= 0
            if window:
                seen &= back < window
            self._masks[length, end, window] = seen
        return self._masks[length, end, window]


def _worth_it(alone: Sequence[Span]) -> bool:
    """Whether one call over a stretch of places reads not much more than the keys that are needed."""
    stretch = max(s.place for s in alone) - min(s.place for s in alone) + 1
    return stretch * max(s.end for s in alone) <= MASKED_SHARE * sum(s.end for s in alone)
