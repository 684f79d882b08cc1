"""The kernel of `native/low_rank.c`: the narrow products of segments of tokens, on a processor, in bfloat16.

Each adapter's narrow products by themselves are a dozen calls for a few microseconds of work, over factors that are
converted first. Here all segments and projections are one call, which reads A and B where they lie and writes their
gradients where they will lie. It is for processors that multiply bfloat16 and have no tile registers for it, and needs
a C compiler on the machine.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from functools import cache
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaw.core.bank import Place
from deltaw.core.compiled import NATIVE, NoKernel, passes, products_without_tiles

WIDEST = 256
"""Most columns of h; wider products are as quick by themselves."""
_PART, _SEGMENT, _ROWS = struct.Struct("qqQQQQd"), struct.Struct("qqqq"), struct.Struct("Qqq")


class Part(NamedTuple):
    """A (R, I), B (O, R) and s of an adapter at one projection."""

    which: int
    A: Tensor
    B: Tensor
    scale: float


class Segment(NamedTuple):
    """Consecutive tokens of one adapter, and what it changes."""

    start: int
    stop: int
    parts: Sequence[Part]

    @property
    def columns(self) -> int:
        """Its columns of h: each part's rank, made even."""
        return sum(part.A.shape[0] + part.A.shape[0] % 2 for part in self.parts)


class Target(NamedTuple):
    """Where the gradients of a part are written, in float32."""

    dA: Tensor
    dB: Tensor


class _Rows(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64), ("width", ctypes.c_int64)]


class _Job(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int64) for name in ("segments", "threads", "wide")),
                *((name, ctypes.c_char_p) for name in ("segment", "part")),
                *((name, _Rows) for name in ("x", "dx", "h")), ("y", ctypes.c_char_p)]


def takes(x: Tensor) -> bool:
    """Whether the kernel is for an input (..., I) such as this; asked first, since it costs nothing."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.shape[-1] % 32 == 0 and is_there()


def fits(x: Tensor, outputs: Sequence[int], segments: Sequence[Segment]) -> bool:
    """Whether the kernel can be asked for the changes of these segments of x (..., I) to outputs of these widths."""
    if not segments or not takes(x) or torch.compiler.is_compiling():
        return False
    factors = [t for segment in segments for part in segment.parts for t in (part.A, part.B)]
    dtype = factors[0].dtype
    return (all(width % 32 == 0 for width in outputs) and dtype in (torch.float32, torch.bfloat16)
            and all(t.dtype == dtype and t.is_contiguous() for t in factors)
            and max(segment.columns for segment in segments) <= WIDEST)


def gradients(x_TI: Tensor, h_TC: Tensor, g: Sequence[Tensor | None], dx_TI: Tensor | None,
              segments: Sequence[Segment], places: Sequence[Place] = ()) -> list[Tensor | None]:
    """dA and dB of every part in turn, float32, None where its y has no g; x's are added to dx (T, I).

    With a place in a bank for each part they are added there instead, and nothing is returned.
    """
    g = [None if g_TO is None else g_TO.contiguous() for g_TO in g]
    parts = [part for segment in segments for part in segment.parts]
    fresh = {place for place in places if _is_target(place)}
    own = []
    for part, place in zip_longest(parts, places):
        if place in fresh:
            fresh.remove(place)  # an adapter's next segment is added to what this one writes
            own.append(Target(*place.gradients))
        else:
            own.append(_own_target(part))
    backward(x_TI, h_TC, g, dx_TI, segments, own)
    if not places:
        return [None if g[part.which] is None else grad for part, to in zip(parts, own, strict=True) for grad in to]
    for part, place, to in zip(parts, places, own, strict=True):
        if g[part.which] is None:
            continue
        if to.dA is place.gradients[0]:
            place.show()
        else:
            place.add(*to)
    return []


def _own_target(part: Part) -> Target:
    return Target(torch.empty_like(part.A, dtype=torch.float32), torch.empty_like(part.B, dtype=torch.float32))


def _is_target(place: Place) -> bool:
    """Whether gradients may be written to their place at once: nothing is there, and it holds float32."""
    return place.gradients[0].dtype == torch.float32 and place.is_fresh


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_there() -> bool:
    """Whether this machine has the kernel."""
    return _was_made()


@cache
def _was_made() -> bool:
    try:
        return products_without_tiles() and _library() is not None
    except NoKernel:
        return False


@cache
def _library() -> ctypes.CDLL:
    return passes(NATIVE / "low_rank.c", _Job)


def forward(x_TI: Tensor, y: Sequence[Tensor], segments: Sequence[Segment]) -> Tensor:
    """Add every change to y (T, O) of each projection; returns h = s·x Aᵀ (T, columns) for `backward`."""
    h_TC = x_TI.new_zeros(len(x_TI), columns_of(segments))
    _run(_library().forward, segments, x_TI, None, h_TC, y, None)
    return h_TC


def columns_of(segments: Sequence[Segment]) -> int:
    """Columns of h, in whole vectors of 32."""
    return -(-max(segment.columns for segment in segments) // 32) * 32


def backward(x_TI: Tensor, h_TC: Tensor, g: Sequence[Tensor | None], dx_TI: Tensor | None, segments: Sequence[Segment],
             targets: Sequence[Target]) -> None:
    """Write the gradients of all parts in turn to their targets, from g of each y; add x's to dx (T, I).

    Targets of a part whose y has no g stay as they are.
    """
    _run(_library().backward, segments, x_TI, dx_TI, h_TC, g, targets)


def _run(function: Callable[[Any], bool], segments: Sequence[Segment], x: Tensor, dx: Tensor | None, h: Tensor,
         y: Sequence[Tensor | None], targets: Sequence[Target] | None) -> None:
    x = x if x.stride(1) == 1 else x.contiguous()
    parts = [part for segment in segments for part in segment.parts]
    if targets is None:
        packed = [_PART.pack(part.which, len(part.A), part.A.data_ptr(), part.B.data_ptr(), 0, 0, part.scale)
                  for part in parts]
    else:
        packed = [_PART.pack(part.which, len(part.A), part.A.data_ptr(), part.B.data_ptr(), to.dA.data_ptr(),
                             to.dB.data_ptr(), part.scale) for part, to in zip(parts, targets, strict=True)]
    spans, at = [], 0
    for segment in segments:
        spans.append(_SEGMENT.pack(segment.start, segment.stop, at, len(segment.parts)))
        at += len(segment.parts)
    job = _Job(len(spans), torch.get_num_threads(), parts[0].A.dtype == torch.float32, b"".join(spans),
               b"".join(packed), _rows(x), _Rows() if dx is None else _rows(dx), _rows(h),
               b"".join(_ROWS.pack(0, 0, 0) if t is None else _ROWS.pack(t.data_ptr(), t.stride(0), t.shape[1])
                        for t in y))
    if not function(ctypes.byref(job)):
        raise MemoryError("low-rank products: there is no memory for their buffers; take smaller batches")


def _rows(t: Tensor) -> _Rows:
    return _Rows(t.data_ptr(), t.stride(0), t.shape[1])
