"""The kernel of `native/low_rank.c`: layers of one input with the changes of segments of tokens, on a processor, in
bfloat16.

Each adapter's narrow products by themselves are a dozen calls for a few microseconds of work, over factors that are
converted first. Here all segments and projections are one call, which reads A and B where they lie, adds their products
to the frozen ones before those are rounded, and writes gradients where they will lie. It is for processors that multiply
bfloat16 and have no tile registers for it, and needs a C compiler on the machine.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaw.core.compiled import NATIVE, NoKernel, passes, products_without_tiles

WIDEST = 256
"""Most columns of h; wider products are as quick by themselves."""
_PART, _SEGMENT, _ROWS, _FROZEN = (struct.Struct(form) for form in ("qqQQQQd", "qqqq", "Qqq", "QQqq"))


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


class Dense(NamedTuple):
    """A frozen W (O, I) and b (O,) or None that the kernel multiplies with; no W where that is done elsewhere."""

    W: Tensor | None = None
    b: Tensor | None = None

    def fits(self, x: Tensor) -> bool:
        """Whether the kernel can multiply x (T, I), which it takes, or a gradient of its format with it."""
        W, b = self
        return (W is not None and W.dtype == x.dtype and 1 in W.stride() and W.shape[0] % 32 == W.shape[1] % 32 == 0
                and (b is None or (b.dtype == x.dtype and b.is_contiguous())))


class _Rows(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64), ("width", ctypes.c_int64)]


class _Job(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int64) for name in ("tokens", "segments", "projections", "threads", "wide", "onto_dx")),
                *((name, ctypes.c_char_p) for name in ("segment", "part", "frozen")),
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


def forward(x_TI: Tensor, y: Sequence[Tensor], segments: Sequence[Segment], dense: Sequence[Dense] = ()) -> Tensor:
    """Write every product of `dense`, and add every change, to y (T, O) of each projection; returns h for `backward`."""
    h_TC = x_TI.new_zeros(len(x_TI), columns_of(segments))
    _run(_library().forward, segments, x_TI, None, h_TC, y, None, dense)
    return h_TC


def product(x_TI: Tensor, W_OI: Tensor, b_O: Tensor | None, y_TO: Tensor) -> bool:
    """Write x Wᵀ + b to y, and return True, where the kernel is for it."""
    dense = Dense(W_OI, b_O)
    if not (_takes_now(x_TI) and dense.fits(x_TI) and y_TO.stride(1) == 1):
        return False
    _run(_library().forward, (), x_TI, None, x_TI, [y_TO], None, [dense])
    return True


def transposed_product(g_TO: Tensor, W_OI: Tensor, dx_TI: Tensor, *, add: bool) -> bool:
    """Write g W to dx, or add it, and return True, where the kernel is for it."""
    dense = Dense(W_OI)
    if not (_takes_now(g_TO) and dense.fits(g_TO) and dx_TI.stride(1) == g_TO.stride(1) == 1):
        return False
    _run(_library().backward, (), dx_TI, dx_TI, dx_TI, [g_TO], (), [dense], add)
    return True


def _takes_now(x: Tensor) -> bool:
    return takes(x) and not torch.compiler.is_compiling() and not torch.is_grad_enabled() and x.numel() > 0


def columns_of(segments: Sequence[Segment]) -> int:
    """Columns of h, in whole vectors of 32."""
    return -(-max(segment.columns for segment in segments) // 32) * 32


def backward(x_TI: Tensor, h_TC: Tensor, g: Sequence[Tensor | None], dx_TI: Tensor | None, segments: Sequence[Segment],
             targets: Sequence[Target], dense: Sequence[Dense] = (), *, onto_dx: bool = True) -> None:
    """Write the gradients of all parts in turn to their targets, from g of each y; write x's to dx (T, I), or add them.

    Targets of a part whose y has no g stay as they are.
    """
    _run(_library().backward, segments, x_TI, dx_TI, h_TC, g, targets, dense, onto_dx)


def _run(function: Callable[[Any], bool], segments: Sequence[Segment], x: Tensor, dx: Tensor | None, h: Tensor,
         y: Sequence[Tensor | None], targets: Sequence[Target] | None, dense: Sequence[Dense],
         onto_dx: bool = False) -> None:
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
    job = _Job(len(x), len(spans), len(y), torch.get_num_threads(), bool(parts) and parts[0].A.dtype == torch.float32, onto_dx,
               b"".join(spans), b"".join(packed), b"".join(map(_frozen, dense or [Dense()] * len(y))),
               _rows(x), _Rows() if dx is None else _rows(dx), _rows(h),
               b"".join(_ROWS.pack(0, 0, 0) if t is None else _ROWS.pack(t.data_ptr(), t.stride(0), t.shape[1])
                        for t in y))
    if not function(ctypes.byref(job)):
        raise MemoryError("low-rank products: there is no memory for their buffers; take smaller batches")


def _frozen(layer: Dense) -> bytes:
    W, b = layer
    return _FROZEN.pack(0, 0, 0, 0) if W is None else \
        _FROZEN.pack(W.data_ptr(), 0 if b is None else b.data_ptr(), *W.stride())


def _rows(t: Tensor) -> _Rows:
    return _Rows(t.data_ptr(), t.stride(0), t.shape[1])
