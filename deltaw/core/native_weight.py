"""Frozen layers as the kernel of `native_low_rank` is told of them: W in bfloat16, or in codes that it unpacks itself.

Codes are unpacked where the kernel lays out a panel of W, in the processor's cache: nothing is written to memory, and
a layer in codes takes hardly longer than one in bfloat16. The numbers have the bits of `packed.Packed.strips`.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
from torch import Tensor

from deltaw.core.packed import Packed, unpacked_absmax

_FORM = struct.Struct("QqqqqQQQ")
NOTHING = _FORM.pack(*(0,) * 8)
"""A layer whose product is computed elsewhere."""
_LEAST_BLOCK = 64


class FrozenLayer(NamedTuple):
    """A frozen W (O, I) and b (O,) or None that the kernel multiplies with; no W where that is done elsewhere."""

    W: Tensor | Packed | None = None
    b: Tensor | None = None

    def fits(self, x: Tensor) -> bool:
        """Whether the kernel can multiply x (T, I), which it takes, or a gradient of its format with it."""
        W, b = self
        if W is None or not W.shape[0] % 32 == W.shape[1] % 32 == 0:
            return False
        readable = is_readable(W) if isinstance(W, Packed) else W.dtype == x.dtype and 1 in W.stride()
        return readable and (b is None or (b.dtype == x.dtype and b.is_contiguous()))

    def told(self) -> tuple[bytes, Tensor | None]:
        """What the kernel reads, and a tensor that has to be there as long as it does."""
        W, b = self
        if W is None:
            return NOTHING, None
        bias = 0 if b is None else b.data_ptr()
        if isinstance(W, Tensor):
            return _FORM.pack(W.data_ptr(), *W.stride(), 16, 0, 0, 0, bias), None
        if W.kind == "int8":
            scale_O = W.absmax.mul(1.0 / 127.0)
            return _FORM.pack(W.codes.data_ptr(), W.shape[1], 1, 8, 0, scale_O.data_ptr(), 0, bias), scale_O
        scale, table = unpacked_absmax(W.state), W.state.code
        shift = W.state.blocksize.bit_length() - 1
        return _FORM.pack(W.codes.data_ptr(), W.shape[1], 1, 4, shift, scale.data_ptr(), table.data_ptr(), bias), scale


def is_readable(W: Packed) -> bool:
    """Whether the kernel can unpack these codes."""
    if not W.codes.is_cpu or not W.codes.is_contiguous():
        return False
    if W.kind == "int8":
        return W.codes.dtype == torch.int8 and W.absmax.dtype == torch.float32 and W.absmax.dim() == 1
    block, code = int(W.state.blocksize), W.state.code
    return (W.codes.dtype == torch.uint8 and W.shape[1] % block == 0 and block >= _LEAST_BLOCK
            and block & (block - 1) == 0 and code.dtype == torch.float32 and code.numel() == 16)
