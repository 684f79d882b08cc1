"""A model folder's weights as they lie on disk: which tensor is where in which safetensors file. Nothing is loaded.

A safetensors file is eight bytes of header length, a JSON header, and the tensors' bytes one after another; so a tensor
can be copied, or read alone, by its offsets.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaw.bases import packed
from deltaw.bases.packed import Packed
from deltaw.errors import BaseModelError, Fault

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}
FLOATS: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items() if dtype.is_floating_point}
_REMEDY = "The download may be incomplete, or the file damaged: fetch it again"


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor on disk."""

    name: str
    file: str
    dtype: str
    """As safetensors writes it: "BF16"."""
    shape: tuple[int, ...]
    begin: int
    """Offset of its first byte in the file."""
    end: int
    parts: tuple[Stored, ...] = ()
    """What it is packed into, where a quantizer has packed it: `dtype` and `shape` are then those of its values."""
    transposed: bool = False
    """It was turned before it was packed."""

    @property
    def is_float(self) -> bool:
        """Whether it holds plain floating-point numbers, and not integers or a quantizer's codes."""
        return self.dtype in FLOATS.values()


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """All tensors of a model folder by name, in the order of their files and bytes."""

    folder: Path
    tensors: Mapping[str, Stored]
    metadata: Mapping[str, Mapping[str, str]]
    """What the header of each file says beside its tensors."""
    index: Mapping[str, Any] | None
    """The parsed index of a checkpoint in several files."""

    def read(self, stored: Stored) -> Tensor:
        """One tensor, in memory of its own; of a packed one, its values."""
        if stored.parts:
            values = self.read_packed(stored).values().to(DTYPES[stored.dtype])
            return values.t().contiguous() if stored.transposed else values
        tensor = torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
        with (self.folder / stored.file).open("rb", buffering=0) as file:
            file.seek(stored.begin)
            view = memoryview(as_bytes(tensor)) if tensor.numel() else memoryview(b"")
            while view:
                count = file.readinto(view)
                if not count:
                    raise BaseModelError(Fault(str(self.folder / stored.file), "became shorter while it was read"))
                view = view[count:]
        return tensor

    def read_packed(self, stored: Stored) -> Packed:
        """A packed tensor as it is."""
        module = len(stored.name) - len(packed.WEIGHT)
        return packed.from_parts({part.name[module:]: self.read(part) for part in stored.parts}, DTYPES[stored.dtype])


def as_bytes(tensor: Tensor) -> Any:
    """A contiguous tensor's memory as an array of bytes."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


def read_checkpoint(folder: Path) -> Checkpoint:
    """What the headers of a folder's safetensors say; `BaseModelError` lists all that does not fit together."""
    index = _index(folder)
    files = [SINGLE] if index is None else sorted(set(index["weight_map"].values()))
    faults: list[Fault] = []
    tensors: dict[str, Stored] = {}
    metadata: dict[str, Mapping[str, str]] = {}
    for file in files:
        for stored in _header(folder, file, metadata, faults):
            if stored.name in tensors:
                faults.append(Fault(f"tensor '{stored.name}'", f"is in {tensors[stored.name].file} and in {file}",
                                    "each tensor once", _REMEDY))
            tensors[stored.name] = stored
    for name, file in ({} if index is None else index["weight_map"]).items():
        if file in metadata and (name not in tensors or tensors[name].file != file):
            faults.append(Fault(f"tensor '{name}'", f"is not in {file}", f"where {INDEX} says it is", _REMEDY))
    if faults:
        raise BaseModelError(*faults[:50])
    return Checkpoint(folder=folder, tensors=tensors, metadata=metadata, index=index)


def _index(folder: Path) -> dict[str, Any] | None:
    """The index of a folder with several files, or None for one with a single file."""
    path = folder / INDEX
    if not path.is_file():
        if (folder / SINGLE).is_file():
            return None
        raise BaseModelError(Fault(f"base '{folder}'", f"has neither {SINGLE} nor {INDEX}", "one of them",
                                   "Save it as transformers does: model.save_pretrained(folder)"))
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        files = set(index["weight_map"].values())
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        raise BaseModelError(Fault(str(path), "cannot be read", "a JSON object with a weight_map", _REMEDY)) from error
    outside = [file for file in files if not isinstance(file, str) or Path(file).name != file]
    if outside or not files:
        raise BaseModelError(Fault(str(path), f"names the files {outside[:3]}", "files of this folder", _REMEDY))
    assert isinstance(index, dict)
    return index


def _header(folder: Path, file: str, metadata: dict[str, Mapping[str, str]], faults: list[Fault]) -> list[Stored]:
    """The tensors of one file in the order of their bytes."""
    from safetensors import SafetensorError, safe_open

    path = folder / file
    try:
        with safe_open(path, framework="pt") as checked:
            metadata[file] = checked.metadata() or {}
        with path.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
    except FileNotFoundError:
        faults.append(Fault(str(path), "is missing", f"a file that {INDEX} names", _REMEDY))
        return []
    except (SafetensorError, OSError, ValueError) as error:
        faults.append(Fault(str(path), f"cannot be read ({error})", "a safetensors file", _REMEDY))
        return []
    start = 8 + length
    entries = [Stored(name, file, entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0],
                      start + entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
    return sorted(entries, key=lambda stored: (stored.begin, stored.end))
