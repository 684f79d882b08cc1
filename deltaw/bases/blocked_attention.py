"""Causal attention on a processor as batched products over blocks of queries.

    S = s·q kᵀ,  P = softmax(S),  y = P v
    dv = Pᵀ g,  dP = g vᵀ,  dS = s·P∘(dP - rowsum(P∘dP)),  dq = dS k,  dk = dSᵀ q

torch's kernel for processors multiplies one tile of one head at a time. In bfloat16, where a processor has products
for it but no tile registers, setting up each costs more than the product: 32 examples of 32 tokens take it 11 ms and
this 3 (and `native_attention` 1, where there is a compiler). Here one product is of all examples and heads, queries
that share a head of keys (grouped-query attention) are rows of the same one, and a block of 64 queries meets the keys
up to its last query alone, so that little above the diagonal is computed. A block's scores stay in the cache and in
memory that is used again; P is made anew in the backward pass, as torch's kernel does it. S, P and dP are float32,
other products are rounded as they come.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from deltaw.core.compiled import products_without_tiles

BLOCK = 64
"""Queries of an example that are multiplied at once."""
TILE = 1 << 20
"""Most scores that exist at once: 4 MB."""
LONGEST = 2048
"""Tokens of an example from which on torch's kernel is as quick."""


def is_quicker(query: Tensor) -> bool:
    """Whether these blocks beat torch's kernel: in bfloat16, where it is multiplied natively and not in tiles."""
    return query.dtype == torch.bfloat16 and query.device.type == "cpu" and products_without_tiles()


class _Memory(threading.local):
    """Buffers by name, used again; each thread has its own."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """A tensor with anything in it, good until the next call with this name."""
        count = math.prod(shape)
        held = self.buffers.get((name, dtype))
        if held is None or held.numel() < count:
            held = self.buffers[name, dtype] = torch.empty(count, dtype=dtype)
        return held[:count].view(shape)

    def filled(self, name: str, dtype: torch.dtype, source: Tensor) -> Tensor:
        """`source` as contiguous (pairs, rows, D), from (examples, KV heads, ..., D)."""
        copied = self.take(name, dtype, *source.shape).copy_(source)
        return copied.view(source.shape[0] * source.shape[1], -1, source.shape[-1])


_memory = _Memory()


def release() -> None:
    """Give this thread's buffers back."""
    _memory.buffers.clear()


@cache
def _diagonal() -> Tensor:
    """What is added to the scores of a block with itself: (BLOCK, BLOCK), -inf above the diagonal."""
    return torch.full((BLOCK, BLOCK), -torch.inf).triu_(1)


@dataclass(frozen=True, slots=True)
class _Keys:
    """Some examples and heads of keys (pairs, in the products), whose blocks fit the tile."""

    q: Tensor
    """(examples, KV heads, queries of a head of keys, T, D)"""
    k: Tensor
    """(examples, KV heads, T, D), as v"""
    v: Tensor
    at: tuple[slice, slice]
    """Which examples and heads they are."""

    def blocks(self) -> Iterator[slice]:
        """The queries of each block; its keys end where they do."""
        tokens = self.q.shape[3]
        return (slice(start, min(start + BLOCK, tokens)) for start in range(0, tokens, BLOCK))

    def by_head(self, rows_NRD: Tensor) -> Tensor:
        """Rows of a block's products (pairs, rows, D) as (examples, KV heads, queries of a head of keys, ..., D)."""
        return rows_NRD.view(*self.q.shape[:3], -1, rows_NRD.shape[2])

    def probabilities(self, q_NRD: Tensor, k_NDT: Tensor, queries: slice) -> Tensor:
        """P (pairs, rows, keys) of a block, float32, in memory of its own; k is scaled."""
        pairs, rows, _ = q_NRD.shape
        P = torch.bmm(q_NRD, k_NDT[:, :, :queries.stop], out=_memory.take("P", torch.float32, pairs, rows,
                                                                          queries.stop))
        count = queries.stop - queries.start
        P.view(pairs, -1, count, queries.stop)[..., queries].add_(_diagonal()[:count, :count])
        return torch.softmax(P, -1, out=P)


def _parts(q: Tensor, k: Tensor, v: Tensor) -> Iterator[_Keys]:
    examples, heads, tokens, _ = q.shape
    shared = heads // k.shape[1]
    pairs = max(1, TILE // (shared * min(BLOCK, tokens) * tokens))
    some, some_heads = max(1, pairs // k.shape[1]), min(pairs, k.shape[1])
    grouped = _grouped(q, k)
    for e in range(0, examples, some):
        for h in range(0, k.shape[1], some_heads):
            at = slice(e, e + some), slice(h, h + some_heads)
            yield _Keys(grouped[at], k[at], v[at], at)


def _grouped(t: Tensor, k: Tensor) -> Tensor:
    """t (examples, heads, T, D) as (examples, KV heads, queries of a head of keys, T, D)."""
    return t.view(t.shape[0], k.shape[1], -1, *t.shape[2:])


def forward(scale: float, q: Tensor, k: Tensor, v: Tensor, y: Tensor) -> None:
    """Write y (examples, heads, T, D) from q of its shape and k, v (examples, KV heads, T, D): views, in one dtype."""
    y_grouped = _grouped(y, k)
    for part in _parts(q, k, v):
        k_NDT = _memory.filled("k", torch.float32, part.k).mul_(scale).transpose(1, 2)
        v_NTD = _memory.filled("v low", q.dtype, part.v)
        for queries in part.blocks():
            q_NRD = _memory.filled("q", torch.float32, part.q[..., queries, :])
            P = part.probabilities(q_NRD, k_NDT, queries)
            low = _memory.take("P low", q.dtype, *P.shape).copy_(P)
            out = torch.bmm(low, v_NTD[:, :queries.stop], out=_memory.take("y", q.dtype, *q_NRD.shape))
            y_grouped[part.at][..., queries, :] = part.by_head(out)


def backward(scale: float, g: Tensor, q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Write the gradients of `forward`'s q, k and v, from g of y; each in the layout of what it is a gradient of."""
    g_grouped, dq_grouped = _grouped(g, k), _grouped(dq, k)
    wide, low = torch.float32, q.dtype
    take, filled = _memory.take, _memory.filled
    for part in _parts(q, k, v):
        k_low = filled("k low", low, part.k)
        k_NDT = filled("k", wide, part.k).mul_(scale).transpose(1, 2)
        v_NDT = filled("v", wide, part.v).transpose(1, 2)
        sums = [take(name, wide, *k_low.shape).zero_() for name in ("dk", "dv")]
        for queries in part.blocks():
            q_low, g_low = (filled(name, low, t[..., queries, :])
                            for name, t in (("q low", part.q), ("g low", g_grouped[part.at])))
            q_NRD, g_NRD = (take(name, wide, *t.shape).copy_(t) for name, t in (("q", q_low), ("g", g_low)))
            P = part.probabilities(q_NRD, k_NDT, queries)
            dS = torch.bmm(g_NRD, v_NDT[:, :, :queries.stop], out=take("dS", wide, *P.shape))
            P_low = take("P low", low, *P.shape).copy_(P)
            torch._softmax_backward_data(dS, P, -1, wide, grad_input=dS)
            dS_low = take("dS low", low, *P.shape).copy_(dS.mul_(scale))
            for total, left, right in zip(sums, (dS_low, P_low), (q_low, g_low), strict=True):
                share = take("share", low, len(left), queries.stop, right.shape[2])
                total[:, :queries.stop] += torch.bmm(left.transpose(1, 2), right, out=share)
            out = torch.bmm(dS_low, k_low[:, :queries.stop], out=take("dq", low, *q_low.shape))
            dq_grouped[part.at][..., queries, :] = part.by_head(out)
        for target, total in zip((dk, dv), sums, strict=True):
            target[part.at] = total.view(part.k.shape)
