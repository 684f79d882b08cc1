"""What merging will do, worked out and checked from headers alone: for each tensor of the result, where it comes from.

    tensor on disk, untouched     copied byte for byte
    changed by one site           W + s·BA, rounded once
    trained in full               replaced: a bias, a tensor of a saved module
    put together when loaded      each part on disk gets its part of s·BA (experts that are stacked in memory)
    tied to a changed tensor      written beside it with the base's values, and the config unties them
    a new head                    added; a body without the head's prefix is renamed to the whole model's names

All that is wrong is said at once, and nothing is written before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from deltaw.core import Adapter, Geometry, SiteDelta
from deltaw.errors import BaseMismatchError, Fault, StateError, near
from deltaw.merge.checkpoint import FLOATS, Checkpoint, Stored
from deltaw.merge.naming import tensor_name, with_common_prefix
from deltaw.merge.skeleton import Skeleton

_APART = "Merge in memory instead: deltaw.detach(model, merge=name), then model.save_pretrained(folder)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """A site's change to one tensor."""

    site: str
    geometry: Geometry | None = None
    """How the changed weight is read; None where a value takes its place."""
    value: str = ""
    """Which of the site's tensors takes its place."""
    part_of: str = ""
    """The tensor in memory that the one on disk is a part of."""


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of the result: its name, its base on disk (if it has one) and what changes it."""

    name: str
    file: str
    shape: tuple[int, ...]
    base: Stored | None
    edit: Edit | None = None


@dataclass(slots=True)
class Plan:
    """All tensors of the result, and what its config must say."""

    outputs: list[Output]
    unties: bool = False
    head: str = ""
    """The class of the model where the checkpoint gets a head that it did not have."""
    renamed: bool = False
    same_names: bool = True
    """Whether the adapter's names are those of the whole model, so that its base's fingerprint can be compared."""
    faults: list[Fault] = field(default_factory=list)
    """What shows that the adapter is for another base."""
    obstacles: list[Fault] = field(default_factory=list)
    """What fits and can still not be merged on disk."""


def make_plan(adapter: Adapter, checkpoint: Checkpoint, skeleton: Skeleton | None) -> Plan:
    """The plan of merging an adapter into a checkpoint; raises BaseMismatchError or StateError with all faults."""
    return _Planner(adapter, checkpoint, skeleton).plan()


class _Planner:
    def __init__(self, adapter: Adapter, checkpoint: Checkpoint, skeleton: Skeleton | None) -> None:
        self.adapter, self.checkpoint, self.skeleton = adapter, checkpoint, skeleton
        live = {name: (name, False) for name in checkpoint.tensors} if skeleton is None else \
            skeleton.live_names(list(checkpoint.tensors))
        self.live_of = {stored: name for stored, (name, _) in live.items()}
        self.parts = {name for name, in_parts in live.values() if in_parts}
        self.stored: dict[str, Stored] = {name: checkpoint.tensors[s] for s, (name, in_parts) in live.items()
                                          if not in_parts}
        self.tied = {} if skeleton is None else skeleton.tied
        self.edits: dict[str, Edit] = {}  # by the name on disk
        self.added: dict[str, Edit | None] = {}  # by the name in memory
        self.result = Plan([])

    def plan(self) -> Plan:
        """Every edit, then every tensor."""
        self._check_parameters_settled()
        for site, tensor, delta, value in self._wanted():
            self._place(site, tensor, delta, value)
        self._untie()
        result = self.result
        result.renamed = bool(self.added) and any(name != live for name, live in self.live_of.items())
        if result.renamed and not self._can_rename():
            result.obstacles.append(Fault("base", "its names on disk differ from those in memory, and a tensor is to "
                                          "be added", "names that transformers keeps", _APART))
        if result.faults:
            raise BaseMismatchError(*result.faults, *result.obstacles)
        if result.obstacles:
            raise StateError(*result.obstacles)
        result.outputs = list(self._outputs())
        return result

    # -- the adapter's side ------------------------------------------------------------------------------------------

    def _wanted(self) -> Iterator[tuple[str, str, SiteDelta, str]]:
        """Site, tensor in memory, change, and which tensor takes its place, for all that the adapter changes."""
        known = {*self.stored, *self.parts, *(self.skeleton.shapes if self.skeleton else ())}
        asked = []
        for site, delta in self.adapter.sites.items():
            if delta.geometry.kind == "saved":
                asked += [(site, f"{site}.{key}", delta, key) for key in delta.tensors]
            elif delta.geometry.kind == "bias":
                asked.append((site, site, delta, "bias"))
            else:
                own = self.skeleton.names.get(site) if self.skeleton else None
                asked.append((site, own or tensor_name(site, delta.geometry.kind), delta, ""))
        names = with_common_prefix([tensor for _, tensor, _, _ in asked], known)
        for site, tensor, delta, value in asked:
            found = names[tensor]
            self.result.same_names &= found == tensor
            if found is None:
                self.result.faults.append(Fault(
                    f"site '{site}'", f"the base has no tensor '{tensor}'", "a tensor of the base",
                    near(tensor, known) or "The adapter was made for another base"))
            else:
                yield site, found, delta, value

    def _place(self, site: str, tensor: str, delta: SiteDelta, value: str) -> None:
        """Note what a site does to a tensor in memory, where that is on disk."""
        base = self.stored.get(self.tied.get(tensor, tensor))
        if base is None and tensor in self.parts:
            self._place_in_parts(site, tensor, delta)
            return
        if base is None and not value:
            self.result.faults.append(Fault(f"site '{site}'", f"'{tensor}' is not in the checkpoint", "a stored tensor",
                                            "A new module cannot be adapted: put it in modules_to_save"))
            return
        if value:
            edit = self._replacement(site, tensor, delta, value, base)
        else:
            assert base is not None
            edit = self._low_rank(site, tensor, delta, base.shape, base)
        if edit is None:
            return
        if base is not None and tensor not in self.tied:
            self.edits[base.name] = edit
        else:
            self.added[tensor] = edit
            self.result.head = self.result.head or ("" if tensor in self.tied else self._class_name())

    def _replacement(self, site: str, tensor: str, delta: SiteDelta, value: str, base: Stored | None) -> Edit | None:
        got = tuple(delta.tensors[value].shape)
        wanted = self.skeleton.shapes.get(tensor) if self.skeleton else None
        wanted = wanted or (base.shape if base else got)
        if got != wanted:
            self.result.faults.append(Fault(f"'{tensor}'", f"a trained tensor of shape {got}", f"{wanted}",
                                            "The adapter was made for another base"))
            return None
        return Edit(site=site, value=value)

    def _low_rank(self, site: str, tensor: str, delta: SiteDelta, shape: tuple[int, ...],
                  base: Stored | None) -> Edit | None:
        geometry = self._geometry(tensor, delta, shape)
        if geometry is None:
            self.result.faults.append(Fault(
                f"site '{site}'", f"A {tuple(delta.A.shape)}, B {tuple(delta.B.shape)}",
                f"factors for '{tensor}' of shape {shape}", "The adapter was made for another base"))
        elif base is not None and not base.is_float:
            self.result.obstacles.append(Fault(f"'{tensor}'", f"holds {base.dtype}: it is quantized",
                                               "a floating-point weight",
                                               "Merge into the base as it was before quantization"))
        elif geometry.is_dense_grouped(delta.A):
            self.result.obstacles.append(Fault(
                f"site '{site}'", "a grouped convolution with an ungrouped A, as PEFT trains it, has no merged form",
                "factors that follow the groups", "Keep this adapter unmerged"))
        else:
            return Edit(site=site, geometry=geometry)
        return None

    def _geometry(self, tensor: str, delta: SiteDelta, shape: tuple[int, ...]) -> Geometry | None:
        """How the base's tensor is read, or None where the factors do not fit it."""
        known = self.skeleton.geometries.get(tensor) if self.skeleton else None
        geometry = replace(delta.geometry if known is None else known, slices=delta.geometry.slices)
        if known is None and geometry.kind == "parameter":
            geometry = replace(geometry, shape=shape)
        if geometry.shape != shape or delta.A.dim() != len(geometry.factor_shapes(1)[0]):
            return None
        return geometry if geometry.rank_of(delta.A, delta.B) >= 1 and geometry.fits(delta.A, delta.B) else None

    def _place_in_parts(self, site: str, tensor: str, delta: SiteDelta) -> None:
        """Note what a site does to each part on disk of a tensor that is put together in memory."""
        assert self.skeleton is not None
        shape = self.skeleton.shapes[tensor]
        edit = self._low_rank(site, tensor, delta, shape, None) if delta.is_low_rank else None
        if edit is None and delta.is_low_rank:
            return
        try:
            pieces = self.skeleton.pieces(tensor, torch.empty(shape, device="meta"))
        except Exception:  # one stored tensor made of several in memory, or an operation without an inverse
            pieces = {}
        disk = self.checkpoint.tensors
        fits = pieces and all(n in disk and tuple(piece.shape) == disk[n].shape for n, piece in pieces.items())
        if edit is None or not fits:
            self.result.obstacles.append(Fault(f"site '{site}'", f"'{tensor}' is stored in another form",
                                               "a tensor that can be changed on disk", _APART))
            return
        for name in pieces:
            self.edits[name] = replace(edit, part_of=tensor)

    def _check_parameters_settled(self) -> None:
        for module, unsettled in dict(self.adapter.facts.get("unsettled_parameters") or {}).items():
            self.result.obstacles.append(Fault(
                f"'{module}'", f"the file does not say which change belongs to which of {unsettled['candidates']}",
                "an adapter saved by deltaw", "Load it on the model and save it once"))

    # -- the checkpoint's side ---------------------------------------------------------------------------------------

    def _untie(self) -> None:
        """Where one of several tied tensors changes, all of them get values of their own."""
        changed = {self.live_of[name] for name in self.edits} | set(self.added)
        if not changed & {*self.tied, *self.tied.values()}:
            return
        self.result.unties = True
        for name, source in self.tied.items():
            if name not in changed and source in self.stored:
                self.added.setdefault(name, None)

    def _can_rename(self) -> bool:
        """Whether a checkpoint with memory's names would load as what it is."""
        if self.parts or self.skeleton is None:
            return False
        live = list(self.live_of.values())
        return len(set(live)) == len(live) and all(
            name == found for found, (name, _) in self.skeleton.live_names(live).items())

    def _outputs(self) -> Iterator[Output]:
        """Every tensor on disk in its order, then the added ones in the file of what they are made from."""
        for name, stored in self.checkpoint.tensors.items():
            live = self.live_of[name]
            if live in self.added and live in self.tied:
                continue  # a tied tensor's own copy on disk, which loading ignores
            edit = self.edits.get(name)
            shape = stored.shape
            if edit is not None and edit.value:
                shape = tuple(self.adapter.sites[edit.site].tensors[edit.value].shape)
            yield Output(live if self.result.renamed else name, stored.file, shape, stored, edit)
        last = max(self.checkpoint.metadata)
        for name, edit in self.added.items():
            base = self.stored.get(self.tied.get(name, name))
            if edit is not None and edit.value:
                shape = tuple(self.adapter.sites[edit.site].tensors[edit.value].shape)
                yield Output(name, base.file if base else last, shape, base, edit)
            else:
                assert base is not None
                yield Output(name, base.file, base.shape, base, edit)

    def _class_name(self) -> str:
        return "" if self.skeleton is None else type(self.skeleton.model).__name__


def new_dtype(output: Output, adapter: Adapter, dtype: torch.dtype | None, common: str) -> str:
    """What a tensor of the result is stored as: the base's own dtype, or the one asked for where it holds floats."""
    if output.base is not None:
        return FLOATS[dtype] if dtype is not None and output.base.is_float else output.base.dtype
    assert output.edit is not None
    value = adapter.sites[output.edit.site].tensors[output.edit.value]
    if not value.is_floating_point():
        return _INTEGERS[value.dtype]
    return common if dtype is None else FLOATS[dtype]


_INTEGERS = {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
             torch.bool: "BOOL"}
