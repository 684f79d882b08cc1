"""Carry a plan out: stream every file of the result tensor by tensor, and count what rounding kept of the change.

W + s·BA is summed in float32 (float64 for such a base) and rounded once to the dtype it is stored in, by the same sum
in the same order as `Switchboard.merge`: the same machine gives the same bits. One tensor is in memory at a time, with
its change; of experts that are stacked in memory, one layer's.
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from deltaw.bases import packed
from deltaw.core import Adapter, Geometry, SiteDelta
from deltaw.core.methods import lora
from deltaw.core.survival import SiteChange, change_of
from deltaw.errors import Fault, StateError
from deltaw.merge.checkpoint import DTYPES, INDEX, Checkpoint, Stored, as_bytes
from deltaw.merge.plan import Edit, Output, Plan, new_dtype
from deltaw.merge.skeleton import Skeleton

_CHUNK = 1 << 24
_ALIGNMENT = 8
_COUNTED = 1 << 18
"""Values that are counted at a time: figures must not cost more memory than the work."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file to be written."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    """Its bytes."""


class Writer:
    """Writes a plan's files into a folder."""

    def __init__(self, adapter: Adapter, checkpoint: Checkpoint, skeleton: Skeleton | None, plan: Plan,
                 dtype: torch.dtype | None, progress: Callable[[int, int], None] | None, *,
                 repack: bool = False) -> None:
        self.repack = repack
        self.adapter, self.checkpoint, self.skeleton, self.plan = adapter, checkpoint, skeleton, plan
        self.changes: list[SiteChange] = []
        self.faults: list[Fault] = []
        floats = [stored.dtype for stored in checkpoint.tensors.values() if stored.is_float]
        common = max(set(floats), key=floats.count) if floats else "F32"
        self.dtypes = {output.name: new_dtype(output, adapter, dtype, common) for output in plan.outputs}
        self.total = sum(entry.size for output in plan.outputs for entry in self.entries(output))
        self._done, self._progress = 0, progress
        self._parts: dict[str, dict[str, Tensor]] = {}

    def write(self, folder: Path) -> list[str]:
        """Every file of weights; their names. Raises StateError with every merged weight that is not finite."""
        places = self._lay_out(folder)
        for output in self.plan.outputs:
            for entry, content in self._contents(output):
                file, offset = places[entry.name]
                with file.open("r+b") as opened:
                    opened.seek(offset)
                    if isinstance(content, Stored):
                        self._copy(opened, content)
                    else:
                        opened.write(memoryview(as_bytes(content)))
                self._done += entry.size
            if self._progress is not None:
                self._progress(self._done, self.total)
        if self.faults:
            raise StateError(*self.faults)
        files = list(dict.fromkeys(file for file, _ in places.values()))
        for file in files:
            _flush(file)
        if self.checkpoint.index is None:
            return [file.name for file in files]
        self._write_index(folder / INDEX)
        return [*(file.name for file in files), INDEX]

    def entries(self, output: Output) -> list[Entry]:
        """What one tensor of the plan is written as: itself, or what it is packed into."""
        name = self.dtypes[output.name]
        if not self._is_packed(output):
            size = torch.Size(output.shape).numel() * _itemsize(name, output.base)
            return [Entry(output.name, output.file, name, output.shape, size)]
        assert output.base is not None
        found = []
        for part in output.base.parts:
            shape, size = part.shape, part.end - part.begin
            if output.edit is not None and packed.STATE_MARK in part.name:
                size = packed.state_length(size)
                shape = (size,)
            found.append(Entry(_part_name(output, part), part.file, part.dtype, shape, size))
        return found

    def _is_packed(self, output: Output) -> bool:
        return self.repack and output.base is not None and bool(output.base.parts)

    def _lay_out(self, folder: Path) -> dict[str, tuple[Path, int]]:
        """Every file with its header and room for its tensors; where each tensor begins."""
        files: dict[str, list[Entry]] = defaultdict(list)
        for output in self.plan.outputs:
            for entry in self.entries(output):
                files[entry.file].append(entry)
        places = {}
        for file, entries in files.items():
            # Widest first, as safetensors' own writer has it, so that every tensor stays aligned.
            entries = sorted(entries, key=lambda e: -(DTYPES[e.dtype].itemsize if e.dtype in DTYPES else
                                                      e.size // max(1, torch.Size(e.shape).numel())))
            header: dict[str, object] = {"__metadata__": {"format": "pt"} | dict(self.checkpoint.metadata[file])}
            end = 0
            for entry in entries:
                begin, end = end, end + entry.size
                header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [begin, end]}
                places[entry.name] = (folder / file, begin)
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
            text += b" " * (-len(text) % _ALIGNMENT)
            with (folder / file).open("xb") as opened:
                opened.write(len(text).to_bytes(8, "little") + text)
                opened.truncate(8 + len(text) + end)
            places |= {entry.name: (folder / file, places[entry.name][1] + 8 + len(text)) for entry in entries}
        return places

    @torch.no_grad()
    def _contents(self, output: Output) -> Iterator[tuple[Entry, Tensor | Stored]]:
        """What to write for each entry of one tensor of the plan: a tensor, or a place to copy from."""
        entries = self.entries(output)
        name, base = self.dtypes[output.name], output.base
        if self._is_packed(output):
            assert base is not None
            if output.edit is None:
                yield from zip(entries, base.parts, strict=True)
            else:
                yield from self._packed_again(output, entries)
            return
        if output.edit is None and base is not None and base.dtype == name and not base.parts:
            yield entries[0], base
            return
        before = None if base is None else self.checkpoint.read(base)
        wide = before if output.edit is None else self._changed(output, output.edit, before)
        assert wide is not None
        stored = wide.to(DTYPES[name])
        self._check_finite(output, name, before, stored)
        if output.edit is not None:
            self.changes.append(change_of(output.edit.site, output.name, name, base=before, wide=wide, stored=stored))
        yield entries[0], stored

    def _packed_again(self, output: Output, entries: list[Entry]) -> Iterator[tuple[Entry, Tensor]]:
        """The changed values of a packed weight, rounded back to its grid."""
        assert output.base is not None
        assert output.edit is not None
        base = self.checkpoint.read_packed(output.base)
        before = base.values()
        turned = output.base.transposed
        wide = self._changed(output, output.edit, before.t().contiguous() if turned else before)
        wide = wide.t() if turned else wide
        self._check_finite(output, base.packing.kind, before, wide)
        again = packed.pack(wide, base.packing)
        self.changes.append(change_of(output.edit.site, output.name, base.packing.kind, base=before, wide=wide,
                                      stored=again.values(), packed=True))
        prefix = len(output.base.name) - len(packed.WEIGHT)
        for entry, part in zip(entries, output.base.parts, strict=True):
            tensor = again.parts[part.name[prefix:]]
            yield entry, packed.padded_state(tensor, entry.size) if packed.STATE_MARK in part.name else tensor

    def _check_finite(self, output: Output, dtype: str, base: Tensor | None, stored: Tensor) -> None:
        bad = _not_finite(stored)
        if bad and (output.edit is not None or base is None or not _not_finite(base)):
            self.faults.append(Fault(f"'{output.name}'", f"{bad} of its values are not finite in {dtype}",
                                     "finite values", "The adapter is broken, or too large for this dtype"))

    def _copy(self, file: BinaryIO, stored: Stored) -> None:
        with (self.checkpoint.folder / stored.file).open("rb") as source:
            source.seek(stored.begin)
            left = stored.end - stored.begin
            while left:
                part = source.read(min(left, _CHUNK))
                if not part:
                    raise OSError(f"{stored.file} became shorter while it was read")
                file.write(part)
                left -= len(part)

    def _changed(self, output: Output, edit: Edit, base: Tensor | None) -> Tensor:
        """The changed tensor before rounding."""
        delta = self.adapter.sites[edit.site]
        if edit.value and (base is None or delta.geometry.kind != "bias"):
            return delta.tensors[edit.value]
        assert base is not None
        total = base.to(torch.promote_types(base.dtype, torch.float32), copy=True)
        if edit.value:
            return total.add_(delta.tensors[edit.value].to(total.dtype) - total)
        if edit.part_of:
            return total.add_(self._part(edit, output).to(total.dtype))
        assert edit.geometry is not None
        return add_change(total, delta, self.adapter.scaling(edit.site), edit.geometry)

    def _part(self, edit: Edit, output: Output) -> Tensor:
        """The part of a stacked tensor's change that belongs to one tensor on disk; each is asked for once."""
        assert self.skeleton is not None
        assert edit.geometry is not None
        assert output.base is not None
        if edit.part_of not in self._parts:
            delta = self.adapter.sites[edit.site]
            whole = lora.delta_weight(delta.A, delta.B, self.adapter.scaling(edit.site), edit.geometry)
            self._parts[edit.part_of] = self.skeleton.pieces(edit.part_of, whole)
        parts = self._parts[edit.part_of]
        part = parts.pop(output.base.name)
        if not parts:
            del self._parts[edit.part_of]
        return part

    def _write_index(self, path: Path) -> None:
        assert self.checkpoint.index is not None
        index = dict(self.checkpoint.index)
        index["weight_map"] = {entry.name: entry.file for output in self.plan.outputs
                               for entry in self.entries(output)}
        known = index.get("metadata")
        index["metadata"] = {**(known if isinstance(known, dict) else {}), "total_size": self.total}
        if "total_parameters" in index["metadata"]:
            index["metadata"]["total_parameters"] = sum(torch.Size(o.shape).numel() for o in self.plan.outputs)
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def add_change(total: Tensor, delta: SiteDelta, scaling: float, geometry: Geometry) -> Tensor:
    """`total` plus s·BA, in place; for a linear weight in one product that never forms BA beside it."""
    if geometry.kind != "linear":
        change = lora.delta_weight(delta.A, delta.B, scaling, geometry)
        return total.add_(change.to(total.dtype))
    A, B = delta.A.to(total.dtype), geometry.dense_out(delta.B).to(total.dtype)
    (total.t() if geometry.transposed else total).addmm_(B, A, alpha=scaling)
    return total


def _not_finite(tensor: Tensor) -> int:
    """How many values are NaN or infinite."""
    if not tensor.is_floating_point():
        return 0
    suspect = (part for part in torch.split(tensor.reshape(-1), _COUNTED)
               if not math.isfinite(part.sum(dtype=torch.promote_types(part.dtype, torch.float32))))
    return sum(int((~torch.isfinite(part)).sum()) for part in suspect)


def _part_name(output: Output, part: Stored) -> str:
    """What a part of a packed tensor is called in the result."""
    assert output.base is not None
    leaf = len(packed.WEIGHT)
    return output.name[:-leaf] + part.name[len(output.base.name) - leaf:]


def _flush(path: Path) -> None:
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _itemsize(dtype: str, base: Stored | None) -> int:
    """Bytes of one value; of a dtype that torch here does not know, what the base's tensor takes."""
    if dtype in DTYPES:
        return DTYPES[dtype].itemsize
    assert base is not None
    count = torch.Size(base.shape).numel()
    return (base.end - base.begin) // count if count else 1
