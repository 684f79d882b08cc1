"""The kernel of `native/low_rank.c`: layers of one input with the changes of segments of tokens, on a processor, in
bfloat16.

Each adapter's narrow products by themselves are a dozen calls for a few microseconds of work, over factors that are
converted first. Here all segments and projections are one call, which reads A and B where they lie, adds their products
to the frozen ones before those are rounded, and writes gradients where they will lie. It is for processors that
multiply bfloat16 and have no tile registers for it, and needs a C compiler on the machine.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from functools import cache
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from deltaw.core import followed
from deltaw.core.compiled import NATIVE, are_made, passes
from deltaw.core.native_weight import FrozenLayer
from deltaw.core.packed import Packed as Codes

WIDEST = 256
"""Most columns of h; wider products are as quick by themselves."""
_PART, _SEGMENT, _ROWS = (struct.Struct(form) for form in ("qqQQQQd", "qqqq", "Qqq"))


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


class Packed(NamedTuple):
    """Segments as the kernel reads them; whoever makes it keeps their tensors."""

    spans: bytes
    parts: bytes
    columns: int
    """The most that a segment has."""
    wide: bool
    """Whether factors are float32."""


class _Rows(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64), ("width", ctypes.c_int64)]


class _Job(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int64) for name in (
                    "tokens", "segments", "projections", "threads", "wide", "onto_dx")),
                *((name, ctypes.c_char_p) for name in ("segment", "part", "frozen")),
                *((name, _Rows) for name in ("x", "dx", "h")), ("y", ctypes.c_char_p)]


def takes(x: Tensor) -> bool:
    """Whether the kernel is for an input (..., I) such as this; asked first, since it costs nothing."""
    return followed.are_served(x) and x.shape[-1] % 32 == 0 and (x.is_meta or is_there())


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
    return are_made(_library)


@cache
def _library() -> ctypes.CDLL:
    return passes(NATIVE / "low_rank.c", _Job)


def packed_part(part: Part, to: Target | None) -> bytes:
    """A part, and where its gradients are written, as the kernel reads it."""
    _, A, B, scale = part
    dA, dB = (0, 0) if to is None else (to.dA.data_ptr(), to.dB.data_ptr())
    return _PART.pack(part.which, A.shape[0], A.data_ptr(), B.data_ptr(), dA, dB, scale)


def packed_spans(spans: Sequence[tuple[int, int, int]]) -> bytes:
    """The first token of each segment, the one after its last, and its parts, as the kernel reads them."""
    made, at = [], 0
    for start, stop, parts in spans:
        made.append(_SEGMENT.pack(start, stop, at, parts))
        at += parts
    return b"".join(made)


def packed(segments: Sequence[Segment], targets: Sequence[Target] = ()) -> Packed:
    """Segments, and where the gradients of all parts in turn are written."""
    parts = [part for segment in segments for part in segment.parts]
    return Packed(packed_spans([(s.start, s.stop, len(s.parts)) for s in segments]),
                  b"".join(packed_part(*both) for both in zip_longest(parts, targets)),
                  max((s.columns for s in segments), default=0), bool(parts) and parts[0].A.dtype == torch.float32)


NOTHING = Packed(b"", b"", 0, wide=False)


def forward(x_TI: Tensor, y: Sequence[Tensor], segments: Packed, layers: Sequence[FrozenLayer]) -> Tensor:
    """Write each layer's product, and add every change, to y (T, O) of its projection; returns h of `backward`."""
    h_TC = x_TI.new_zeros(len(x_TI), in_vectors(segments.columns))
    _run("forward", segments, x_TI, None, h_TC, y, layers)
    return h_TC


def product(x_TI: Tensor, W_OI: Tensor | Codes, b_O: Tensor | None, y_TO: Tensor) -> bool:
    """Write x Wᵀ + b to y, and return True, where the kernel is for it."""
    layer = FrozenLayer(W_OI, b_O)
    if not (_takes_now(x_TI) and layer.fits(x_TI) and y_TO.stride(1) == 1):
        return False
    _run("forward", NOTHING, x_TI, None, x_TI, [y_TO], [layer])
    return True


def transposed_product(g_TO: Tensor, W_OI: Tensor | Codes, dx_TI: Tensor, *, add: bool) -> bool:
    """Write g W to dx, or add it, and return True, where the kernel is for it."""
    layer = FrozenLayer(W_OI)
    if not (_takes_now(g_TO) and layer.fits(g_TO) and dx_TI.stride(1) == g_TO.stride(1) == 1):
        return False
    _run("backward", NOTHING, dx_TI, dx_TI, dx_TI, [g_TO], [layer], add)
    return True


def _takes_now(x: Tensor) -> bool:
    return takes(x) and not torch.compiler.is_compiling() and not torch.is_grad_enabled() and x.numel() > 0


def columns_of(segments: Sequence[Segment]) -> int:
    """Columns of h."""
    return in_vectors(max(segment.columns for segment in segments))


def in_vectors(columns: int) -> int:
    """Columns in whole vectors of 32."""
    return -(-columns // 32) * 32


def backward(x_TI: Tensor, h_TC: Tensor, g: Sequence[Tensor | None], dx_TI: Tensor | None, segments: Packed,
             layers: Sequence[FrozenLayer], *, onto_dx: bool) -> None:
    """Write the gradients of all parts to their targets, from g of each y; write x's to dx (T, I), or add them.

    Targets of a part whose y has no g stay as they are.
    """
    _run("backward", segments, x_TI, dx_TI, h_TC, g, layers, onto_dx)


def _run(direction: str, segments: Packed, x: Tensor, dx: Tensor | None, h: Tensor, y: Sequence[Tensor | None],
         layers: Sequence[FrozenLayer], onto_dx: bool = False) -> None:
    listener = followed.listener_of(x)
    if listener is not None:
        ahead = direction == "forward"
        _tell(listener, segments, x, y, layers, ahead=ahead, of_x=ahead or dx is not None)
        return
    x = x if x.stride(1) == 1 else x.contiguous()
    frozen = [layer.told() for layer in layers]
    job = _Job(len(x), len(segments.spans) // _SEGMENT.size, len(y), torch.get_num_threads(), segments.wide, onto_dx,
               segments.spans, segments.parts, b"".join(told for told, _ in frozen),
               _rows(x), _Rows() if dx is None else _rows(dx), _rows(h),
               b"".join(_ROWS.pack(0, 0, 0) if t is None else _ROWS.pack(t.data_ptr(), t.stride(0), t.shape[1])
                        for t in y))
    if not getattr(_library(), direction)(ctypes.byref(job)):
        raise MemoryError("low-rank products: there is no memory for their buffers; take smaller batches")


def _tell(listener: followed.Listener, segments: Packed, x: Tensor, y: Sequence[Tensor | None],
          layers: Sequence[FrozenLayer], *, ahead: bool, of_x: bool) -> None:
    """(M, N, K) of each product in a call: of y and h, or of dx, dh and the gradients of factors."""
    (tokens, inputs), widths = x.shape, [0 if t is None else t.shape[1] for t in y]
    frozen = [width for width, layer in zip(widths, layers, strict=True) if layer.W is not None and width and of_x]
    narrow: list[followed.Shape] = []
    parts = list(_PART.iter_unpack(segments.parts))
    for start, stop, first, count in _SEGMENT.iter_unpack(segments.spans):
        own = stop - start
        for which, rank, *_ in parts[first:first + count]:
            width = widths[which]
            if ahead:
                narrow += [(own, rank, inputs), (own, width, rank)]
            elif width:
                narrow += [(own, rank, width), (width, rank, own), (rank, inputs, own)] + [(own, inputs, rank)] * of_x
    listener.hear_products([(tokens, width, inputs) if ahead else (tokens, inputs, width) for width in frozen], narrow)


def _rows(t: Tensor) -> _Rows:
    return _Rows(t.data_ptr(), t.stride(0), t.shape[1])
