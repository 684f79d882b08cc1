"""4-bit weights unpacked on a GPU in one launch, where Triton is installed.

bitsandbytes takes three launches for a layer with double quantization (the scales, their offset, the weight), and a
fourth where it packed another format than is computed in. The kernel here (`unpacking_kernel`) reads the codes and the
packed scales and writes W once, to the bits of `dequantize_4bit(codes, state).to(dtype)`. Before its first use in each
form it is compared with that; where it differs, or cannot be compiled, bitsandbytes unpacks, and a warning says why.

W lies in memory of torch's own allocator: freed when the product that reads it has been given to the stream, it is
handed out again for the next layer. A buffer kept here would be there twice, since autograd runs the backward pass in
a thread of its own, and would have to know of streams and of CUDA graphs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

_FORMATS = (torch.bfloat16, torch.float16, torch.float32)
_WORDS = 512
"""Words of 32 bits that a program unpacks: one load of 16 bytes for each thread of 4 warps."""
_MOST = 2**31 - 8 * _WORDS
"""Numbers that the kernel can count."""


class Form(NamedTuple):
    """What decides whether the kernel can be used: it is compared with bitsandbytes once for each."""

    kind: str
    device: torch.device
    stored: torch.dtype
    """What bitsandbytes rounds W to."""
    wanted: torch.dtype
    block: int
    nested: bool


Write = Callable[[Tensor, Tensor, Any], None]
"""Unpacks to its first argument the codes and the state that follow."""


def unpacked(codes: Tensor, state: Any, dtype: torch.dtype) -> Tensor | None:
    """W (O, I) in new memory, from a bitsandbytes QuantState; None where the kernel is not used."""
    if not _fits(codes, state, dtype):
        return None
    write = _writer(Form(state.quant_type, codes.device, state.dtype, dtype, state.blocksize, state.nested))
    if write is None:
        return None
    W_OI = torch.empty(state.shape, dtype=dtype, device=codes.device)
    write(W_OI, codes, state)
    return W_OI


def _fits(codes: Tensor, state: Any, dtype: torch.dtype) -> bool:
    """Whether the kernel can read what is there."""
    count, scales = math.prod(state.shape), [state.absmax]
    if state.nested:
        outer = state.state2
        if outer.nested or outer.dtype != torch.float32 or state.absmax.dtype != torch.uint8:
            return False
        scales += [outer.code, outer.absmax, state.offset]
    return (dtype in _FORMATS and state.dtype in _FORMATS and state.blocksize % 8 == 0
            and count % 8 == 0 and 0 < count <= _MOST and codes.nbytes * 2 == count
            and codes.shape[0] != 1  # bitsandbytes' old layout, which comes back transposed
            and codes.is_contiguous() and codes.data_ptr() % 4 == 0
            and all(scale.device == codes.device and scale.is_contiguous() for scale in scales)
            and all(scale.dtype == torch.float32 for scale in scales[state.nested:]))


@cache
def _writer(form: Form) -> Write | None:
    """The kernel in this form; None, with a warning, where it is missing or does not give bitsandbytes' bits."""
    try:
        write = _compiled(form)
        reason = "" if _is_exact(write, form) else f"the kernel's numbers are not bitsandbytes' with {form}"
    except ImportError:
        reason = "Triton is not installed (pip install triton)"
    except Exception as error:  # a compiler, a driver or a device: whatever it is, there is another way
        reason = f"the kernel cannot be compiled ({type(error).__name__}: {error})"
    if not reason:
        return write
    _say(reason)
    return None


@cache
def _say(reason: str) -> None:
    """Warn, once for each reason."""
    warnings.warn(f"4-bit weights are unpacked by bitsandbytes, which takes longer: {reason}", stacklevel=2)


def _compiled(form: Form) -> Write:
    """The kernel for one form; it is compiled at the first call."""
    import triton.language as tl
    from bitsandbytes.functional import get_4bit_type

    from deltaw.core.unpacking_kernel import unpack_4bit

    table: Tensor = get_4bit_type(form.kind, device=form.device)
    via = getattr(tl, str(form.stored).removeprefix("torch."))

    def write(W_OI: Tensor, codes: Tensor, state: Any) -> None:
        words, absmax = W_OI.numel() // 8, state.absmax
        if state.nested:
            outer = (state.state2.code, state.state2.absmax, state.offset)
            blocks = state.state2.blocksize
        else:
            outer, blocks = (absmax, absmax, absmax), 0
        with torch.cuda.device_of(codes):  # type: ignore[no-untyped-call]
            # A product and a sum that are fused round once where bitsandbytes rounds twice.
            unpack_4bit[((words + _WORDS - 1) // _WORDS,)](
                W_OI, codes, table, absmax, *outer, words, BLOCK=form.block // 8, OUTER=blocks, VIA=via, WORDS=_WORDS,
                num_warps=4, enable_fp_fusion=False)

    return write


def _is_exact(write: Write, form: Form) -> bool:
    """Whether a weight with every code, and more blocks than have one scale in turn, has bitsandbytes' bits."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    steps, sizes = (torch.linspace(start, 1, count, device=form.device) for start, count in
                    ((-1, form.block), (0.01, 300)))
    codes, state = quantize_4bit(torch.outer(sizes, steps).to(form.stored), blocksize=form.block,
                                 quant_type=form.kind, compress_statistics=form.nested)
    W_OI = torch.empty(state.shape, dtype=form.wanted, device=form.device)
    write(W_OI, codes, state)
    return torch.equal(W_OI, dequantize_4bit(codes, state).to(form.wanted))
