"""Weights that bitsandbytes has packed: how one is packed, its values, and other values packed in the same way.

    nf4, fp4   blocks of `block` values share one scale (absmax); with `double` the scales are packed too  (QLoRA, §3)
    int8       rows share one scale (SCB)                                                             (LLM.int8, §3)

A weight and its statistics have names on disk, which are also the names of `Packed.parts`:

    4 bit      weight, weight.absmax, weight.quant_map, weight.quant_state.bitsandbytes__nf4, double: weight.nested_*
    8 bit      weight, SCB, weight_format
"""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deltaw.bases.packing import BLOCK, pack_4bit, pack_8bit
from deltaw.core import packed as core
from deltaw.errors import Fault, MissingDependencyError

Kind = Literal["nf4", "fp4", "int8"]
WEIGHT, SCALES, FORMAT = "weight", "SCB", "weight_format"
STATE = "weight.quant_state.bitsandbytes__"
STATE_MARK = ".quant_state.bitsandbytes__"
_STATE_ROOM = 24
"""Spaces after the JSON of a 4-bit state: another offset has a longer number, and a file's sizes are settled first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How a weight is packed: all that packing other values in the same way needs."""

    kind: Kind
    shape: tuple[int, ...]
    """Shape of the weight itself, (outputs, inputs)."""
    dtype: torch.dtype
    """What its values are computed in: the dtype that it was packed from."""
    block: int = 64
    """Values that share a scale, in 4 bit."""
    double: bool = False
    """The scales are packed too."""
    storage: torch.dtype = torch.uint8
    """What the 4-bit codes lie in."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A packed weight as plain tensors."""

    packing: Packing
    parts: Mapping[str, Tensor]

    def values(self) -> Tensor:
        """The weight in float32, to bitsandbytes' bits."""
        codes = self.parts[WEIGHT]
        if self.packing.kind == "int8":  # training multiplies the scales first, which rounds otherwise
            functional = _functional(self.packing.kind)
            return torch.Tensor(functional.int8_vectorwise_dequant(codes, self.parts[SCALES])).float()
        rows, columns = self.packing.shape
        # A state moves its tensors when it is asked to, so it gets a mapping of its own.
        state = self.state()
        return core.Packed(self.packing.kind, codes, (rows, columns), state.absmax, state).dense(torch.float32)

    def state(self) -> Any:
        """bitsandbytes' own `QuantState` of a 4-bit weight."""
        stats = {name.removeprefix("weight."): part for name, part in self.parts.items() if name != WEIGHT}
        return _functional(self.packing.kind).QuantState.from_dict(stats, device=self.parts[WEIGHT].device)


def is_packed(parameter: object) -> bool:
    """Whether this is a weight that bitsandbytes has packed."""
    loaded = sys.modules.get("bitsandbytes")  # not imported: then nothing can be
    if loaded is None or not isinstance(parameter, Tensor) or parameter.is_floating_point():
        return False
    return isinstance(parameter, (loaded.nn.Params4bit, loaded.nn.Int8Params))


def read_packed(host: nn.Module, parameter: Tensor) -> Packed | None:
    """The packed weight of a live layer, its tensors shared with it; None for a layer with plain numbers."""
    if not is_packed(parameter):
        return None
    weight: Any = parameter
    if weight.dtype == torch.int8:
        state: Any = getattr(host, "state", None)  # the first forward takes the scales from the weight to the layer
        scales = weight.SCB if weight.SCB is not None else state.SCB
        packing = Packing(kind="int8", shape=tuple(weight.shape), dtype=torch.float16)
        return Packed(packing, {WEIGHT: weight.data, SCALES: scales})
    codes, state = weight.data, weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):  # reordered for this processor's bfloat16 products
        codes, state = _functional("nf4")._convert_weight_packed_for_cpu_inverse(codes, copy.copy(state))
    parts = {WEIGHT: codes} | {f"weight.{key}": part for key, part in state.as_dict(packed=True).items()}
    return Packed(_packing_4bit(state, codes.dtype), parts)


def from_parts(parts: Mapping[str, Tensor], dtype: torch.dtype) -> Packed:
    """The packed weight of these tensors of a checkpoint; `dtype` is that of an 8-bit weight's layer."""
    if SCALES in parts:
        shape = tuple(parts[WEIGHT].shape)
        return Packed(Packing(kind="int8", shape=shape, dtype=dtype), dict(parts))
    found = Packed(Packing(kind="nf4", shape=(), dtype=dtype), dict(parts))
    return Packed(_packing_4bit(found.state(), parts[WEIGHT].dtype), dict(parts))


def read_state(blob: bytes) -> dict[str, Any]:
    """What the JSON beside a 4-bit weight says: shape, dtype, block size."""
    found = json.loads(blob)
    assert isinstance(found, dict)
    return found


def pack(values: Tensor, packing: Packing) -> Packed:
    """These values, of the packing's shape, packed in its way: as loading packs, or by bitsandbytes where it cannot."""
    functional = _functional(packing.kind)
    assert tuple(values.shape) == packing.shape
    if packing.kind == "int8":
        codes, scales = pack_8bit(values)
        layout = torch.tensor(0, dtype=torch.uint8)  # row by row, the one layout that is written
        return Packed(packing, {WEIGHT: codes, SCALES: scales, FORMAT: layout})
    if packing.block == BLOCK and packing.storage == torch.uint8 and values.numel() % BLOCK == 0:
        codes, state = pack_4bit(values.float(), packing.kind, double_quant=packing.double)
    else:
        codes, state = functional.quantize_4bit(values.contiguous().float(), blocksize=packing.block,
                                                compress_statistics=packing.double, quant_type=packing.kind,
                                                quant_storage=packing.storage)
    state.dtype = packing.dtype
    return Packed(packing, {WEIGHT: codes} | {f"weight.{k}": part for k, part in state.as_dict(packed=True).items()})


def live(packed: Packed, module: nn.Module) -> nn.Parameter:
    """A parameter that the packed layer `module` computes with."""
    import bitsandbytes

    codes = packed.parts[WEIGHT]
    if packed.packing.kind == "int8":
        made = bitsandbytes.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes,
                                          SCB=packed.parts[SCALES])
        made.scales = packed.parts[SCALES]  # its first forward takes those of bitsandbytes away from it
    else:
        made = bitsandbytes.nn.Params4bit(
            codes, requires_grad=False, quant_state=packed.state(), blocksize=packed.packing.block,
            compress_statistics=packed.packing.double, quant_type=packed.packing.kind,
            quant_storage=packed.packing.storage, module=module, bnb_quantized=True)
    assert isinstance(made, nn.Parameter)
    return made


def padded_state(blob: Tensor, length: int) -> Tensor:
    """A 4-bit state's JSON of this many bytes, with spaces at its end."""
    assert blob.numel() <= length
    return torch.cat([blob, torch.full((length - blob.numel(),), ord(" "), dtype=torch.uint8)])


def state_length(length: int) -> int:
    """How many bytes to leave for the state's JSON of a weight that is packed again; the base's has `length`."""
    return length + _STATE_ROOM


def _packing_4bit(state: Any, storage: torch.dtype) -> Packing:
    return Packing(kind=state.quant_type, shape=tuple(state.shape), dtype=state.dtype, block=state.blocksize,
                   double=bool(state.nested), storage=storage)


def _functional(kind: str) -> Any:
    """bitsandbytes' functions, or how to get them."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingDependencyError(Fault(f"a weight in {kind}", "reading it needs bitsandbytes",
                                           remedy="Install it: pip install 'deltaw[quant]'"))
    import bitsandbytes.functional

    return bitsandbytes.functional


def take_over(module: Any, parameter: Any) -> dict[str, Any]:
    """Let a packed layer compute with this parameter, which its owner puts in place; what `give_back` needs to undo it.

    The layer keeps facts of its weight in attributes of its own, which have to follow.
    """
    if hasattr(parameter, "quant_state"):
        before = {"quant_state": module.quant_state}
        module.quant_state = parameter.quant_state
        return before
    before = {"CB": module.state.CB, "SCB": module.state.SCB}
    module.state.CB = module.state.SCB = None  # the next forward takes those of the weight
    parameter.CB, parameter.SCB = parameter.data, parameter.scales
    return before


def give_back(module: Any, before: Mapping[str, Any]) -> None:
    """Put a packed layer's own facts back."""
    for name, value in before.items():
        setattr(module if name == "quant_state" else module.state, name, value)
