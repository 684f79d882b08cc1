"""The Triton kernel that unpacks 4-bit weights on a GPU; importing this needs Triton (`unpacking_gpu` says who does).

Shapes: W words of a program, 8 numbers in each word of 32 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def unpack_4bit(out: tl.tensor, codes: tl.tensor, table: tl.tensor, absmax: tl.tensor, outer_code: tl.tensor,
                outer_absmax: tl.tensor, offset: tl.tensor, words: tl.tensor, BLOCK: tl.constexpr,
                OUTER: tl.constexpr, VIA: tl.constexpr, WORDS: tl.constexpr) -> None:
    """Write table[code] · scale to `out`, rounded to VIA and then to out's format.

    A block of BLOCK words has one scale: its absmax, or with OUTER > 0 what is packed in 8 bits in its place, of which
    OUTER have one scale in turn: outer_code[absmax] · outer_absmax + offset.
    """
    word_W = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    inside_W = word_W < words
    packed_W = tl.load(codes.to(tl.pointer_type(tl.int32), bitcast=True) + word_W, mask=inside_W, other=0)
    block_W = word_W // BLOCK
    scale_W = tl.load(absmax + block_W, mask=inside_W, other=0)
    if OUTER > 0:
        outer_W = tl.load(outer_absmax + block_W // OUTER, mask=inside_W, other=0.0)
        scale_W = tl.load(outer_code + scale_W.to(tl.int32)) * outer_W + tl.load(offset)
    place_8 = tl.arange(0, 8)
    shift_8 = (place_8 ^ 1) * 4  # of the two in a byte the first is in its upper half
    code_W8 = (packed_W[:, None] >> shift_8[None, :]) & 15
    number_W8 = tl.load(table + code_W8) * scale_W[:, None]  # from the cache: all 16 lie in one line of it
    at_W8 = word_W[:, None] * 8 + place_8[None, :]
    tl.store(out + at_W8, number_W8.to(VIA).to(out.dtype.element_ty), mask=inside_W[:, None])
