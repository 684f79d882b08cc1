"""Packing a weight into 4 or 8 bits, a strip at a time: bitsandbytes' formats and its very bits, in little memory.

On the CPU bitsandbytes quantizes a whole tensor with six temporary tensors of its size in float32 and a binary search
for each number. Blocks do not depend on each other, so strips give the same codes; and a place among 16 sorted values
is found by 15 comparisons of whole strips, which the processor does side by side. Each thread takes strips of its own:
they are too short for torch to divide them, and stay in a core's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor

BLOCK = 64
"""Numbers that share a scale (QLoRA, section 3)."""
NESTED_BLOCK = 256
"""Scales that share a scale, with double quantization."""
_STRIP = 1 << 15
"""Numbers in a strip: torch does not divide so few of them among threads."""
_STRETCH = 1 << 20
"""Numbers that a thread takes at once, strip by strip."""


@torch.no_grad()
def pack_4bit(W: Tensor, kind: str, *, double_quant: bool) -> tuple[Tensor, Any]:
    """The codes of W and bitsandbytes' QuantState; `bitsandbytes.functional.quantize_4bit` gives the same.

    W has a multiple of 64 numbers. Codes are uint8 (numbers / 2, 1).
    """
    from bitsandbytes import functional

    if W.device.type != "cpu":
        return tuple(functional.quantize_4bit(W, blocksize=BLOCK, compress_statistics=double_quant, quant_type=kind))
    flat = W.detach().reshape(-1)
    codes = torch.empty(flat.numel() // 2, 1, dtype=torch.uint8)
    absmax = torch.empty(flat.numel() // BLOCK)

    def pack(start: int, stop: int) -> None:
        part = flat[start:stop].float().view(-1, BLOCK)
        largest = part.abs().amax(1)
        absmax[start // BLOCK:stop // BLOCK] = largest
        scaled = (part * (1.0 / largest.clamp(min=1e-38)).view(-1, 1)).clamp_(-1, 1).view(-1)
        places = _places(scaled, kind)
        codes[start // 2:stop // 2, 0] = (places[::2] << 4) | places[1::2]

    _in_strips(pack, flat.numel(), _STRIP)
    table = functional.get_4bit_type(kind, device=W.device)
    facts: dict[str, Any] = {"shape": W.shape, "dtype": W.dtype, "blocksize": BLOCK, "code": table, "quant_type": kind}
    if not double_quant:
        return codes, functional.QuantState(absmax=absmax, **facts)
    offset = absmax.mean()
    packed, state = functional.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
    return codes, functional.QuantState(absmax=packed, offset=offset, state2=state, **facts)


@torch.no_grad()
def pack_8bit(W_OI: Tensor) -> tuple[Tensor, Tensor]:
    """The int8 codes (O, I) of W and each row's largest number (O,), as bitsandbytes' LLM.int8() has them."""
    from bitsandbytes.functional import int8_vectorwise_quant

    W_OI = W_OI.detach()
    codes, absmax = torch.empty_like(W_OI, dtype=torch.int8), torch.empty(len(W_OI), device=W_OI.device)

    def pack(start: int, stop: int) -> None:
        codes[start:stop], absmax[start:stop], _ = int8_vectorwise_quant(W_OI[start:stop].to(torch.float16))

    rows = max(1, _STRIP // W_OI.shape[1]) if W_OI.device.type == "cpu" else len(W_OI)
    _in_strips(pack, len(W_OI), rows, W_OI.shape[1])
    return codes, absmax


def _in_strips(pack: Callable[[int, int], None], count: int, strip: int, width: int = 1) -> None:
    """Call `pack(start, stop)` for all strips of `count` rows of `width` numbers, stretches of them in threads."""
    stretch = max(1, _STRETCH // (strip * width)) * strip

    def pack_stretch(first: int) -> None:
        for start in range(first, min(first + stretch, count), strip):
            pack(start, min(start + strip, count))

    starts = range(0, count, stretch)
    if len(starts) < 2:
        for start in starts:
            pack_stretch(start)
        return
    with ThreadPoolExecutor(min(torch.get_num_threads(), len(starts))) as pool:
        for _ in pool.map(pack_stretch, starts):
            pass  # an exception of a thread is raised here


def _places(scaled: Tensor, kind: str) -> Tensor:
    """The code of each number in [-1, 1]: how many bounds between the sorted values lie below it."""
    bounds, order = _bounds(kind)
    places = torch.zeros(scaled.shape, dtype=torch.uint8)
    above = torch.empty(scaled.shape, dtype=torch.bool)
    ones = above.view(torch.uint8)  # adding bools is converted number by number, which takes longer than comparing
    for bound in bounds:
        torch.gt(scaled, bound, out=above)
        places += ones
    return places if order is None else order[places.int()]


@cache
def _bounds(kind: str) -> tuple[tuple[float, ...], Tensor | None]:
    """The middles between neighbouring values, and the codes of the sorted values where they are not in order."""
    from bitsandbytes.functional import get_4bit_type

    values = get_4bit_type(kind, device="cpu")
    order = torch.argsort(values)
    middles = (values[order[:-1]] + values[order[1:]]) / 2
    sorted_already = torch.equal(order, torch.arange(len(values)))
    return tuple(middles.tolist()), None if sorted_already else order.to(torch.uint8)
