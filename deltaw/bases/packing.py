"""Packing a weight into 4 or 8 bits, a strip at a time: bitsandbytes' formats and its very bits, in little memory.

On the CPU bitsandbytes quantizes a whole tensor with six temporary tensors of its size in float32 and a binary search
for each number. Blocks do not depend on each other, so strips give the same codes; and a place among 16 sorted values
is found by 15 comparisons of whole strips, which the processor does side by side.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

BLOCK = 64
"""Numbers that share a scale (QLoRA, section 3)."""
NESTED_BLOCK = 256
"""Scales that share a scale, with double quantization."""
_STRIP = 1 << 18


@torch.no_grad()
def pack_4bit(W: Tensor, kind: str, *, double_quant: bool) -> tuple[Tensor, Any]:
    """The codes of W and bitsandbytes' QuantState; `bitsandbytes.functional.quantize_4bit` gives the same.

    W has a multiple of 64 numbers. Codes are uint8 (numbers / 2, 1).
    """
    from bitsandbytes import functional

    if W.device.type != "cpu":
        return tuple(functional.quantize_4bit(W, blocksize=BLOCK, compress_statistics=double_quant, quant_type=kind))
    flat = W.reshape(-1)
    codes = torch.empty(flat.numel() // 2, 1, dtype=torch.uint8)
    absmax = torch.empty(flat.numel() // BLOCK)
    for start in range(0, flat.numel(), _STRIP):
        part = flat[start:start + _STRIP].float().view(-1, BLOCK)
        largest = part.abs().amax(1)
        absmax[start // BLOCK:start // BLOCK + len(largest)] = largest
        scaled = (part * (1.0 / largest.clamp(min=1e-38)).view(-1, 1)).clamp_(-1, 1).view(-1)
        places = _places(scaled, kind)
        codes[start // 2:(start + len(scaled)) // 2, 0] = (places[::2] << 4) | places[1::2]
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

    codes, absmax = torch.empty_like(W_OI, dtype=torch.int8), torch.empty(len(W_OI), device=W_OI.device)
    rows = max(1, _STRIP // W_OI.shape[1])
    for start in range(0, len(W_OI), rows):
        part = slice(start, start + rows)
        codes[part], absmax[part], _ = int8_vectorwise_quant(W_OI[part].to(torch.float16))
    return codes, absmax


def _places(scaled: Tensor, kind: str) -> Tensor:
    """The code of each number in [-1, 1]: how many bounds between the sorted values lie below it."""
    bounds, order = _bounds(kind)
    places = torch.zeros(scaled.shape, dtype=torch.uint8)
    above = torch.empty(scaled.shape, dtype=torch.bool)
    for bound in bounds:
        places += torch.gt(scaled, bound, out=above)
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
