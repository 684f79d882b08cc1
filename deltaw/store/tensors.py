"""Safetensors files, read with distrust: every claim of the header is checked before a tensor is made.

The format is eight bytes of header length, a JSON header of `name: {dtype, shape, data_offsets}`, and the tensors'
bytes one after another. Each tensor is read into memory of its own, so that none shares storage with another.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from deltaw.errors import AdapterFileError, Fault

MAX_HEADER = 100_000_000
"""Bytes of the longest header that is read; safetensors' own limit."""
MAX_SIZE = 1 << 48
"""No size or offset is as large as this; it keeps their products within reason."""
MAX_FAULTS = 50
"""Faults told in one error; a hostile file could have millions."""
REMEDY = "The file is damaged or was not written by safetensors: fetch or save it again"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}
_ENTRY = {"dtype", "shape", "data_offsets"}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, by name; `AdapterFileError` lists all that is wrong with it."""
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        header, start = _read_header(file, size, path)
        faults = _faults(header, size - start, path)
        if faults:
            raise AdapterFileError(*limited(faults, path))
        tensors = {name: _read_one(file, entry, path) for name, entry in _in_order(header)}
    faults = [fault for name, tensor in tensors.items() for fault in _not_finite(name, tensor, path)]
    if faults:
        raise AdapterFileError(*limited(faults, path))
    return tensors


def limited(faults: Sequence[Fault | str], path: Path) -> Sequence[Fault | str]:
    """The faults, cut to `MAX_FAULTS` with one that counts the rest."""
    rest = len(faults) - MAX_FAULTS
    return faults if rest <= 0 else [*faults[:MAX_FAULTS], Fault(str(path), f"has {rest} more faults")]


def shown(name: str) -> str:
    """A name fit for a message: control characters escaped, long ones cut."""
    text = name.encode("unicode_escape").decode("ascii")
    return text if len(text) <= 200 else text[:200] + "..."


def name_fault(name: str) -> str | None:
    """Why a tensor's name is not a dotted module path, or None if it is one."""
    if not name.isprintable():
        return "has control characters"
    if "\\" in name or name.startswith(("/", "~", ".")) or ".." in name or not name or name[-1] == ".":
        return "is not a dotted path of module names"
    return None


def _read_header(file: BinaryIO, size: int, path: Path) -> tuple[dict[str, Any], int]:
    """The header and where the tensors' bytes begin."""
    def damaged(got: str, expected: str) -> AdapterFileError:
        return AdapterFileError(Fault(str(path), got, expected, REMEDY))

    first = file.read(8)
    length = int.from_bytes(first, "little")
    if len(first) < 8:
        raise damaged(f"has only {size} bytes", "a safetensors file")
    if length > MAX_HEADER:
        raise damaged(f"has a header of {length} bytes", f"at most {MAX_HEADER}")
    if length > size - 8:
        raise damaged(f"is cut short: the header needs {length} bytes and {size - 8} follow", "a whole file")
    text = file.read(length)
    repeated: list[str] = []

    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            repeated.extend(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        return found

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=without_repeats)
    except (ValueError, RecursionError) as error:
        raise damaged("has a header that is not JSON", "a safetensors file") from error
    if not isinstance(header, dict):
        raise damaged("has a header that is not a JSON object", "names with dtype, shape and data_offsets")
    if repeated:
        faults = [Fault(f"{path}: '{shown(name)}'", "occurs more than once", "each name once", REMEDY)
                  for name in dict.fromkeys(repeated)]
        raise AdapterFileError(*limited(faults, path))
    return header, 8 + length


def _in_order(header: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The tensors' entries in the order of their bytes."""
    tensors = ((name, entry) for name, entry in header.items() if name != "__metadata__")
    return sorted(tensors, key=lambda item: item[1]["data_offsets"])


def _faults(header: Mapping[str, Any], available: int, path: Path) -> list[Fault]:
    """What is wrong with the header, given how many bytes follow it."""
    found = []
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        found.append(Fault(str(path), "has metadata that is not text", "names with texts", REMEDY))
    for name, entry in header.items():
        if name != "__metadata__":
            got = name_fault(name) or _entry_fault(entry, available)
            if got:
                found.append(Fault(f"{path}: '{shown(name)}'", got, "", REMEDY))
    if found:
        return found
    end = 0
    for name, entry in _in_order(header):
        begin, stop = entry["data_offsets"]
        if begin != end:
            got = "overlaps the tensor before it" if begin < end else "leaves a gap before it"
            found.append(Fault(f"{path}: '{shown(name)}'", got, f"bytes from {end}", REMEDY))
        end = max(end, stop)
    if end != available:
        found.append(Fault(str(path), f"has {available} bytes of tensors", f"{end}", REMEDY))
    return found


def _entry_fault(entry: Any, available: int) -> str | None:
    if not isinstance(entry, dict) or entry.keys() != _ENTRY:
        return "is not described by dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"has the unknown dtype {shown(repr(dtype))}"
    if not are_sizes(shape) or len(shape) > 16:
        return f"has the impossible shape {shown(repr(shape))}"
    if not are_sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= available:
        return f"has offsets {shown(repr(offsets))} outside the file's {available} bytes"
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if needed != offsets[1] - offsets[0]:
        return f"of shape {shape} and dtype {dtype} needs {needed} bytes and has {offsets[1] - offsets[0]}"
    return None


def are_sizes(value: Any) -> bool:
    """Whether this is a list of whole numbers from 0 to 2^48."""
    return isinstance(value, list) and all([type(n) is int and 0 <= n < MAX_SIZE for n in value])  # noqa: C419 (faster)


def _read_one(file: BinaryIO, entry: Mapping[str, Any], path: Path) -> Tensor:
    """The next tensor; the file stands at its first byte."""
    tensor = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
    view = memoryview(tensor.view(-1).view(torch.uint8).numpy().data) if tensor.numel() else memoryview(b"")
    while view:
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise AdapterFileError(Fault(str(path), "became shorter while it was read", "", REMEDY))
        view = view[count:]
    return tensor


def _not_finite(name: str, tensor: Tensor, path: Path) -> list[Fault]:
    """A fault if a tensor holds a NaN or an infinity. Both show in its sum; if that overflows, in its extremes."""
    if not tensor.is_floating_point() or not tensor.numel():
        return []
    if tensor.itemsize == 1:
        tensor = tensor.float()
    if math.isfinite(float(tensor.sum())):  # faster, and the rule
        return []
    least, largest = torch.aminmax(tensor)
    if math.isfinite(float(least)) and math.isfinite(float(largest)):
        return []
    nans, bad = int(tensor.isnan().sum()), int((~tensor.isfinite()).sum())
    return [Fault(f"{path}: '{shown(name)}'", f"holds {nans} NaN and {bad - nans} infinite values", "finite numbers",
                  "The training diverged or the file is damaged: use an earlier checkpoint")]


def to_bytes(tensors: Mapping[str, Tensor], path: str | Path) -> bytes:
    """The content of a safetensors file with these tensors; `AdapterFileError` if one holds a NaN or an infinity."""
    from safetensors.torch import save

    faults = [fault for name, tensor in tensors.items() for fault in _not_finite(name, tensor, Path(path))]
    if faults:
        raise AdapterFileError(*limited(faults, Path(path)))
    plain = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    shared = Counter(tensor.untyped_storage().data_ptr() for tensor in plain.values())
    return bytes(save({name: tensor.clone() if shared[tensor.untyped_storage().data_ptr()] > 1 else tensor
                       for name, tensor in plain.items()}, metadata={"format": "pt"}))
