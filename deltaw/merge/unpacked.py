"""A checkpoint that bitsandbytes has packed, seen as the one that it was packed from: each weight one tensor of values.

So seen it has the names and shapes of the model in memory, and is planned and merged like any other. What a weight is
packed into stays known, for a merge that packs it again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from deltaw.bases import packed
from deltaw.errors import BaseModelError, Fault
from deltaw.merge.checkpoint import FLOATS, Checkpoint, Stored
from deltaw.merge.skeleton import Skeleton

METHOD = "bitsandbytes"
_DTYPES = {str(dtype).removeprefix("torch."): name for dtype, name in FLOATS.items()}


def unpacked(checkpoint: Checkpoint, skeleton: Skeleton | None) -> Checkpoint:
    """The checkpoint with each packed weight as one tensor; itself, where nothing is packed."""
    tensors = dict(checkpoint.tensors)
    floats = Counter(stored.dtype for stored in tensors.values() if stored.dtype in ("F16", "BF16"))
    common = floats.most_common(1)[0][0] if floats else "F32"
    for name in list(tensors):
        parts = _parts(name, checkpoint.tensors)
        if not parts:
            continue
        state = next((part for part in parts if packed.STATE_MARK in part.name), None)
        about = {} if state is None else _state(checkpoint, state)
        shape = tuple(about.get("shape", tensors[name].shape))
        turned = _is_turned(name, shape, skeleton)
        tensors[name] = replace(tensors[name], dtype=_DTYPES[about["dtype"]] if about else common, parts=parts,
                                shape=shape[::-1] if turned else shape, transposed=turned)
        for part in parts[1:]:
            del tensors[part.name]
    return replace(checkpoint, tensors=tensors)


def _parts(name: str, tensors: Mapping[str, Stored]) -> tuple[Stored, ...]:
    """The weight of this name and its statistics, or nothing where it is not packed."""
    module, _, leaf = name.rpartition(".")
    if leaf != packed.WEIGHT:
        return ()
    scales, layout = (f"{module}.{last}" if module else last for last in (packed.SCALES, packed.FORMAT))
    if tensors[name].dtype == "I8" and scales in tensors:
        return tuple(tensors[each] for each in (name, scales, layout) if each in tensors)
    # No search through all names: these are all that a 4-bit weight can have.
    stats = [f"{name}.{last}" for last in ("absmax", "quant_map", "nested_absmax", "nested_quant_map",
                                           *(f"quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")))]
    found = tuple(tensors[each] for each in stats if each in tensors)
    return (tensors[name], *found) if any(packed.STATE_MARK in part.name for part in found) else ()


def _state(checkpoint: Checkpoint, stored: Stored) -> dict[str, Any]:
    try:
        about = packed.read_state(bytes(checkpoint.read(stored).numpy()))
        if about["dtype"] in _DTYPES and len(about["shape"]) == 2:
            return about
        why = f"says {about}"
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        why = f"cannot be read ({error})"
    raise BaseModelError(Fault(f"tensor '{stored.name}'", why, "the shape and dtype of a packed weight",
                               "The file is damaged: fetch or save it again"))


def _is_turned(name: str, shape: tuple[int, ...], skeleton: Skeleton | None) -> bool:
    """Whether the model keeps this weight inputs first (transformers' `Conv1D`), which is turned before packing."""
    if skeleton is None:
        return False
    live = skeleton.live_names([name])[name][0]
    geometry = skeleton.geometries.get(live)
    return geometry is not None and geometry.kind == "linear" and geometry.transposed
