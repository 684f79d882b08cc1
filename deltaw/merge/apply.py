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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from deltaw.core import Adapter, Geometry, SiteDelta
from deltaw.core.methods import lora
from deltaw.errors import Fault, StateError
from deltaw.merge.checkpoint import DTYPES, INDEX, Checkpoint, Stored, as_bytes
from deltaw.merge.plan import Edit, Output, Plan, new_dtype
from deltaw.merge.skeleton import Skeleton

_CHUNK = 1 << 24
_ALIGNMENT = 8
_COUNTED = 1 << 18
"""Values that are counted at a time: figures must not cost more memory than the work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteChange:
    """What merging did to one tensor."""

    site: str
    tensor: str
    """Its name in the merged folder."""
    dtype: str
    shape: tuple[int, ...]
    entries: int
    """Number of its values."""
    changed: int
    """How many of them are stored differently than the base's would be."""
    largest: float
    """The largest |ΔW|, before rounding."""
    lost: float
    """‖stored change - ΔW‖ / ‖ΔW‖: how much of the change rounding to the dtype lost or bent."""


class Writer:
    """Writes a plan's files into a folder."""

    def __init__(self, adapter: Adapter, checkpoint: Checkpoint, skeleton: Skeleton | None, plan: Plan,
                 dtype: torch.dtype | None, progress: Callable[[int, int], None] | None) -> None:
        self.adapter, self.checkpoint, self.skeleton, self.plan = adapter, checkpoint, skeleton, plan
        self.changes: list[SiteChange] = []
        self.faults: list[Fault] = []
        floats = [stored.dtype for stored in checkpoint.tensors.values() if stored.is_float]
        common = max(set(floats), key=floats.count) if floats else "F32"
        self.dtypes = {output.name: new_dtype(output, adapter, dtype, common) for output in plan.outputs}
        self.total = sum(self._size(output) for output in plan.outputs)
        self._done, self._progress = 0, progress
        self._parts: dict[str, dict[str, Tensor]] = {}

    def write(self, folder: Path) -> list[str]:
        """Every file of weights; their names. Raises StateError with every merged weight that is not finite."""
        files: dict[str, list[Output]] = defaultdict(list)
        for output in self.plan.outputs:
            files[output.file].append(output)
        for file, outputs in files.items():
            self._write_file(folder / file, outputs)
        if self.faults:
            raise StateError(*self.faults)
        if self.checkpoint.index is None:
            return list(files)
        self._write_index(folder / INDEX)
        return [*files, INDEX]

    def _size(self, output: Output) -> int:
        return torch.Size(output.shape).numel() * _itemsize(self.dtypes[output.name], output.base)

    def _write_file(self, path: Path, outputs: list[Output]) -> None:
        # Widest first, as safetensors' own writer has it, so that every tensor stays aligned.
        outputs = sorted(outputs, key=lambda o: -_itemsize(self.dtypes[o.name], o.base))
        header: dict[str, object] = {"__metadata__": {"format": "pt"} | dict(self.checkpoint.metadata[path.name])}
        end = 0
        for output in outputs:
            begin, end = end, end + self._size(output)
            header[output.name] = {"dtype": self.dtypes[output.name], "shape": list(output.shape),
                                   "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        with path.open("xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for output in outputs:
                self._write_tensor(file, output)
                self._done += self._size(output)
                if self._progress is not None:
                    self._progress(self._done, self.total)
            file.flush()
            os.fsync(file.fileno())

    @torch.no_grad()
    def _write_tensor(self, file: BinaryIO, output: Output) -> None:
        name = self.dtypes[output.name]
        if output.edit is None and output.base is not None and output.base.dtype == name:
            self._copy(file, output.base)
            return
        base = None if output.base is None else self.checkpoint.read(output.base)
        wide = base if output.edit is None else self._changed(output, output.edit, base)
        assert wide is not None
        stored = wide.to(DTYPES[name])
        bad = _not_finite(stored)
        if bad and (output.edit is not None or base is None or not _not_finite(base)):
            self.faults.append(Fault(f"'{output.name}'", f"{bad} of its values are not finite in {name}",
                                     "finite values", "The adapter is broken, or too large for this dtype"))
        if output.edit is not None:
            self.changes.append(_counted(output, output.edit, name, base, wide, stored))
        file.write(memoryview(as_bytes(stored)))

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
        index["weight_map"] = {output.name: output.file for output in self.plan.outputs}
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


def _counted(output: Output, edit: Edit, dtype: str, base: Tensor | None, wide: Tensor, stored: Tensor) -> SiteChange:
    """The figures of one changed tensor, in pieces so that they need little memory."""
    entries = stored.numel()
    if base is None or base.shape != stored.shape:
        return SiteChange(site=edit.site, tensor=output.name, dtype=dtype, shape=output.shape, entries=entries,
                          changed=entries, largest=float(wide.abs().max()) if entries else 0.0, lost=0.0)
    total = torch.promote_types(base.dtype, torch.float32)
    changed, largest, square, bent = 0, 0.0, 0.0, 0.0
    for before, exact, after in zip(*(torch.split(t.reshape(-1), _COUNTED) for t in (base, wide, stored)), strict=True):
        delta = exact.to(total) - before.to(total)
        kept = after.to(total) - before.to(after.dtype).to(total)
        changed += int(kept.count_nonzero())
        largest = max(largest, float(torch.linalg.vector_norm(delta, math.inf)))
        square += float(torch.linalg.vector_norm(delta)) ** 2
        bent += float(torch.linalg.vector_norm(kept - delta)) ** 2
    return SiteChange(site=edit.site, tensor=output.name, dtype=dtype, shape=output.shape, entries=entries,
                      changed=changed, largest=largest, lost=(bent / square) ** 0.5 if square else 0.0)


def _not_finite(tensor: Tensor) -> int:
    """How many values are NaN or infinite."""
    if not tensor.is_floating_point():
        return 0
    suspect = (part for part in torch.split(tensor.reshape(-1), _COUNTED)
               if not math.isfinite(part.sum(dtype=torch.promote_types(part.dtype, torch.float32))))
    return sum(int((~torch.isfinite(part)).sum()) for part in suspect)


def _itemsize(dtype: str, base: Stored | None) -> int:
    """Bytes of one value; of a dtype that torch here does not know, what the base's tensor takes."""
    if dtype in DTYPES:
        return DTYPES[dtype].itemsize
    assert base is not None
    count = torch.Size(base.shape).numel()
    return (base.end - base.begin) // count if count else 1
