"""Frozen weights in codes of 4 or 8 bits, as bitsandbytes packs them, unpacked a strip of rows at a time.

    nf4, fp4    W = table[code] · absmax of the code's block of 64; with double quantization absmax is packed too
    int8        W = code · absmax of the row / 127                                          (QLoRA, arXiv 2305.14314)

A whole unpacked layer is a new allocation of hundreds of megabytes, and touching new memory takes longer than the
unpacking. A strip is written into a buffer that is used again for the next one, and is still in the processor's cache
when it is multiplied. bitsandbytes' own kernel writes it, to the bits of `bitsandbytes.functional.dequantize_4bit`.
Where the kernel of the product reads codes itself (`native_weight`) no strip is made.
On a GPU a layer is one strip, which `unpacking_gpu` writes in one launch, in memory that torch's allocator hands out
again. Where neither kernel can be used bitsandbytes unpacks the layer.
"""

from __future__ import annotations

import ctypes
import math
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from deltaw.core import unpacking_gpu
from deltaw.core.stretches import rows_of_a_strip

_NATIVE = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Workspace(threading.local):
    """Memory for one strip that is used again and again, one for each thread; a copy of it starts empty."""

    def __init__(self) -> None:
        self.memory: Tensor | None = None

    def __reduce__(self) -> tuple[type[Workspace], tuple[()]]:
        return Workspace, ()

    def take(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """A (rows, columns) tensor on the CPU with anything in it, good until the next call."""
        count = rows * columns
        if self.memory is None or self.memory.dtype != dtype or self.memory.numel() < count:
            self.memory = torch.empty(count, dtype=dtype)
        return self.memory[:count].view(rows, columns)


class Int8Rows(nn.Parameter):
    """The codes (V, I) of a table in 8 bits, with each row's largest number: W = codes · absmax / 127 (`tables`)."""

    absmax: Tensor
    """(V,), float32."""
    dense: weakref.ref[Tensor] | None
    """W unpacked, while somebody holds it."""

    def __new__(cls, codes: Tensor, absmax: Tensor) -> Int8Rows:
        """A frozen parameter over these codes."""
        made = super().__new__(cls, codes, requires_grad=False)
        made.absmax, made.dense = absmax, None
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Rows:
        if id(self) not in memo:
            memo[id(self)] = Int8Rows(self.data.clone(), self.absmax.clone())
        found: Int8Rows = memo[id(self)]
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A frozen weight (O, I) in codes."""

    kind: Literal["nf4", "fp4", "int8"]
    codes: Tensor
    shape: tuple[int, int]
    absmax: Tensor
    """Of each block (4-bit, itself packed where `state` is nested) or of each row (int8)."""
    state: Any = None
    """bitsandbytes' QuantState of a 4-bit weight."""

    def dense(self, dtype: torch.dtype) -> Tensor:
        """All of W in new memory: 4-bit numbers rounded to the format that they were packed from, then to `dtype`."""
        if self.kind == "int8":
            return self.codes.to(dtype).mul_(self.absmax.unsqueeze(1).mul(1.0 / 127.0))
        if self.codes.is_cuda:
            W_OI = unpacking_gpu.unpacked(self.codes, self.state, dtype)
            if W_OI is not None:
                return W_OI
        elif self.state.dtype != dtype and self._writer(self.state.dtype) is not None:
            W_OI = torch.empty(self.shape, dtype=dtype)
            for rows, strip_RI in self.strips(self.state.dtype, Workspace()):  # no second W in that format
                W_OI[rows] = strip_RI
            return W_OI
        from bitsandbytes.functional import dequantize_4bit

        W: Tensor = dequantize_4bit(self.codes, self.state)
        return W.to(dtype)

    def element(self, position: int) -> Tensor:
        """One number of W, counted along its rows: a float32 scalar."""
        if self.kind == "int8":
            return self.codes.view(-1)[position] * self.absmax[position // self.shape[1]] / 127.0
        byte = self.codes.view(-1).view(torch.uint8)[position // 2]
        code = byte & 15 if position % 2 else byte >> 4
        scale = _one_absmax(self.state, position // self.state.blocksize)
        return torch.as_tensor(self.state.code[int(code)] * scale)

    def strips(self, dtype: torch.dtype, workspace: Workspace) -> Iterator[tuple[slice, Tensor]]:
        """W's rows in turn, each strip with the slice that it is of W; it is overwritten by the next one."""
        count, columns = self.shape
        write = self._writer(dtype)
        on_gpu = self.codes.device.type != "cpu"
        if write is None and not (on_gpu and self.kind == "int8"):
            yield slice(0, count), self.dense(dtype)
            return
        for rows in places_of_strips(count, columns, on_gpu=on_gpu):
            if write is None:  # torch's allocator hands the last strip's memory out again
                yield rows, self.codes[rows].to(dtype).mul_(self.absmax[rows].unsqueeze(1).mul(1.0 / 127.0))
                continue
            strip_RI = workspace.take(rows.stop - rows.start, columns, dtype)
            write(rows, strip_RI)
            yield rows, strip_RI

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows (..., I) of W at these places (...), of an int8 weight."""
        flat = ids.reshape(-1)
        codes = self.codes.index_select(0, flat).to(dtype)
        found = codes.mul_(self.absmax.index_select(0, flat).unsqueeze(1).mul(1.0 / 127.0))
        return found.view(*ids.shape, self.shape[1])

    def part(self, rows: slice) -> Packed:
        """Some rows of an int8 weight, in the same memory."""
        codes = self.codes[rows]
        return Packed("int8", codes, (len(codes), self.shape[1]), self.absmax[rows])

    def _writer(self, dtype: torch.dtype) -> Callable[[slice, Tensor], None] | None:
        """What writes some rows of W into a tensor, or None where only bitsandbytes' own function knows how."""
        if self.codes.device.type != "cpu":
            return None
        columns = self.shape[1]
        if self.kind == "int8":
            scale_O = self.absmax.mul(1.0 / 127.0).unsqueeze(1)

            def write_8bit(rows: slice, out: Tensor) -> None:
                out.copy_(self.codes[rows]).mul_(scale_O[rows])

            return write_8bit
        block = self.state.blocksize
        native = _native(self.kind, dtype) if columns % block == 0 and block < 2048 else None
        if native is None or self.codes.dtype != torch.uint8 or not self.codes.is_contiguous():
            return None
        codes, absmax = self.codes.view(-1), unpacked_absmax(self.state)

        def write_4bit(rows: slice, out: Tensor) -> None:
            first = rows.start * columns
            native(codes.data_ptr() + first // 2, absmax.data_ptr() + first // block * 4, out.data_ptr(), block,
                   len(out), columns)

        return write_4bit


def places_of_strips(count: int, columns: int, *, on_gpu: bool = False) -> Iterator[slice]:
    """Which rows of a weight (count, columns) are each strip."""
    size = rows_of_a_strip(count, columns, on_gpu=on_gpu)
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def packed_weight(host: nn.Module) -> Packed | None:
    """The weight of a linear layer that bitsandbytes or `tables` has packed; None for any other layer."""
    weight = host._parameters.get("weight")
    if isinstance(weight, Int8Rows):
        return packed_tensor(weight)
    library = sys.modules.get("bitsandbytes")  # not imported: then nothing is packed by it
    if library is None or weight is None or weight.is_floating_point():
        return None
    own: Any = type(host).forward
    if own is library.nn.Linear8bitLt.forward:
        scales = getattr(weight, "SCB", None)  # the layer's first forward moves them to its state
        return _packed_8bit(weight, getattr(host.state, "SCB", None) if scales is None else scales)
    return packed_tensor(weight) if own is library.nn.Linear4bit.forward else None


def packed_tensor(weight: Tensor) -> Packed | None:
    """A quantized parameter, bitsandbytes' or a table's; None for any other, and where its scales are not with it."""
    if isinstance(weight, Int8Rows):
        return None if weight.is_meta else _packed_8bit(weight, weight.absmax)
    library = sys.modules.get("bitsandbytes")
    if library is None or weight.is_floating_point():
        return None
    if isinstance(weight, library.nn.Params4bit):
        state = weight.quant_state
        if state is None or len(state.shape) != 2 or getattr(state, "packing_format_for_cpu", False):
            return None
        return Packed(state.quant_type, weight.data, (int(state.shape[0]), int(state.shape[1])), state.absmax, state)
    return _packed_8bit(weight, getattr(weight, "SCB", None)) if isinstance(weight, library.nn.Int8Params) else None


_REORDERS = "support_avx512bf16_for_cpu"


def keep_order(model: nn.Module) -> list[nn.Module]:
    """Let no 4-bit layer of the model be reordered any more; those that would have been.

    On a processor with bfloat16 products (AVX512-BF16) bitsandbytes lays a layer's codes out anew at its first
    evaluation and rounds its scales to bfloat16, for good. From then on its values are others, it passes no gradient
    on, without a word, and a layer with fewer inputs than a block is an error.
    """
    layers = [module for module in _four_bit_layers(model) if getattr(module, _REORDERS, False)]
    for layer in layers:
        setattr(layer, _REORDERS, False)
    return layers


def may_reorder(layers: Iterable[nn.Module]) -> None:
    """Undo `keep_order`."""
    for layer in layers:
        setattr(layer, _REORDERS, True)


def reordered(model: nn.Module) -> list[str]:
    """Names of the 4-bit layers whose codes bitsandbytes has laid out anew."""
    names = {module: name for name, module in model.named_modules()}
    return [names[layer] for layer in _four_bit_layers(model)
            if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False)]


def _four_bit_layers(model: nn.Module) -> list[nn.Module]:
    library = sys.modules.get("bitsandbytes")  # not imported: then nothing is packed by it
    return [] if library is None else [m for m in model.modules() if isinstance(m, library.nn.Linear4bit)]


def numbers_in(parameter: Tensor) -> int:
    """How many numbers a parameter stands for, packed or not."""
    packed = packed_tensor(parameter)
    return parameter.numel() if packed is None else math.prod(packed.shape)


def wrapped(weight: Tensor) -> bool:
    """Whether this is another library's tensor around codes, such as torchao's: it has the dtype of its values."""
    if not is_traceable_wrapper_subclass(weight):
        return False
    from torch.distributed.tensor import DTensor  # heavy, and needed for such tensors alone

    return not isinstance(weight, DTensor)  # which wraps plain numbers


def _packed_8bit(weight: Tensor, scales: Tensor | None) -> Packed | None:
    if scales is None or weight.dtype != torch.int8 or weight.dim() != 2:
        return None
    return Packed("int8", weight.data, (weight.shape[0], weight.shape[1]), scales)


def unpacked_absmax(state: Any) -> Tensor:
    """The scales of all blocks in float32."""
    if not state.nested:
        return torch.as_tensor(state.absmax, dtype=torch.float32)
    from bitsandbytes.functional import dequantize_blockwise

    return torch.as_tensor(dequantize_blockwise(state.absmax, state.state2) + state.offset, dtype=torch.float32)


def _one_absmax(state: Any, block: int) -> Tensor:
    """The scale of one block."""
    if not state.nested:
        return torch.as_tensor(state.absmax[block])
    outer = state.state2
    scale = outer.code[int(state.absmax[block])] * outer.absmax[block // outer.blocksize]
    return torch.as_tensor(scale + state.offset)


@cache
def _native(kind: str, dtype: torch.dtype) -> Callable[[int, int, int, int, int, int], None] | None:
    """bitsandbytes' kernel for the CPU, told where to write; None where it is missing or does not give its own bits."""
    from bitsandbytes import cextension
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    library = getattr(getattr(cextension, "lib", None), "_lib", None)
    found = getattr(library, f"cdequantize_blockwise_cpu_{kind}_{_NATIVE.get(dtype)}", None)
    if found is None:
        return None

    def call(codes: int, absmax: int, out: int, block: int, rows: int, columns: int) -> None:
        found(ctypes.c_void_p(codes), ctypes.c_void_p(absmax), ctypes.c_void_p(out), ctypes.c_longlong(block),
              ctypes.c_longlong(rows), ctypes.c_longlong(columns))

    sample = torch.linspace(-1, 1, 256, dtype=dtype).view(2, 128)
    codes, state = quantize_4bit(sample, quant_type=kind)
    written = torch.empty_like(sample)
    call(codes.data_ptr(), state.absmax.data_ptr(), written.data_ptr(), 64, 2, 128)
    return call if torch.equal(written, dequantize_4bit(codes, state)) else None


def holds_codes(module: nn.Module) -> bool:
    """Whether this is a linear layer by its sizes that has no weight."""
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return module._parameters.get("weight") is None and all(isinstance(size, int) for size in sizes)
