"""The kernel of `core/native/attention.c`: causal attention of examples in rows, in bfloat16, on a processor.

Where torch's kernel has no tile registers to multiply bfloat16 with, this is three times as quick and more: its blocks
of scores stay in the first cache. It needs a C compiler on the machine; `blocked_attention` does not.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from deltaw.core.compiled import NATIVE, NoKernel, passes, products_without_tiles


class _Span(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("row", "start", "length")]


class _View(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("row", "head", "token"))]


_INPUTS = ("g", "q", "k", "v", "y", "dq", "dk", "dv", "lse")


class _Job(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int64) for name in ("examples", "heads", "kv_heads", "D")),
                ("scale", ctypes.c_float), ("threads", ctypes.c_int32), ("span", ctypes.POINTER(_Span)),
                *((name, _View) for name in _INPUTS)]


def fits(*inputs: Tensor) -> bool:
    """Whether the kernel can be asked, and is quicker than what torch has: queries, keys and values as they come."""
    query = inputs[0]
    return (query.dtype == torch.bfloat16 and query.device.type == "cpu" and query.shape[-1] % 32 == 0
            and all(t.shape[-1] == query.shape[-1] and t.stride(-1) == 1 for t in inputs) and products_without_tiles()
            and is_there())


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_there() -> bool:
    """Whether this machine has the kernel."""
    return why_not() == ""


@cache
def why_not() -> str:
    """Why there is no kernel on this machine; "" where there is one."""
    try:
        _library()
    except NoKernel as reason:
        return str(reason)
    return ""


@cache
def _library() -> ctypes.CDLL:
    return passes(NATIVE / "attention.c", _Job)


def forward(scale: float, q: Tensor, k: Tensor, v: Tensor, places: Tensor | None, y: Tensor, lse: Tensor) -> None:
    """Write y (B, heads, T, D) and lse (B, heads, T), float32, from q of y's shape and k, v (B, KV heads, T, D).

    Each row is an example, or with places (`packed_attention`) the one row holds several. Views are fine as long as
    numbers of a token's head lie side by side.
    """
    _run(_library().forward, scale, places, q=q, k=k, v=v, y=y, lse=lse)


def backward(scale: float, g: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, places: Tensor | None,
             dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Write the gradients of `forward`'s q, k and v, from g of y; each in any layout that `forward` takes."""
    _run(_library().backward, scale, places, g=g, q=q, k=k, v=v, y=y, lse=lse, dq=dq, dk=dk, dv=dv)


def _run(function: Callable[[Any], bool], scale: float, places: Tensor | None, **tensors: Tensor) -> None:
    query, key = tensors["q"], tensors["k"]
    batch, heads, tokens, width = query.shape
    spans = _spans(batch, tokens, None if places is None else tuple(places.tolist()))
    job = _Job(len(spans), heads, key.shape[1], width, scale, torch.get_num_threads(), spans,
               **{name: _View(t.data_ptr(), *t.stride()[:3]) for name, t in tensors.items()})
    if spans and not function(ctypes.byref(job)):
        raise MemoryError("attention: there is no memory for a thread's buffers; take smaller batches or shorter ones")


@lru_cache(maxsize=8)  # each layer of a model asks for the same
def _spans(batch: int, tokens: int, places: tuple[int, ...] | None) -> Any:
    """The examples, the longest first, so that no thread begins with it when others are done."""
    found = [(row, 0, tokens) for row in range(batch)] if places is None else \
        sorted(((0, a, b - a) for a, b in pairwise(places)), key=lambda span: -span[2])
    found = [span for span in found if span[2]]
    return (_Span * len(found))(*(_Span(*span) for span in found))
