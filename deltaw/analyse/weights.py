"""The base's weights at an adapter's sites, read one by one from its safetensors files. No model is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deltaw import store
from deltaw.core import Adapter, Geometry
from deltaw.merge.checkpoint import Checkpoint, Stored, read_checkpoint
from deltaw.merge.folder import base_folder, check_base
from deltaw.merge.plan import make_plan
from deltaw.merge.skeleton import build_skeleton


@dataclass(frozen=True, eq=False, slots=True)
class BaseWeights:
    """Where the weight of each site lies on disk."""

    folder: Path
    checkpoint: Checkpoint
    places: Mapping[str, tuple[Stored, Geometry]]
    """By site; sites whose weight is put together from several stored tensors are missing."""

    def matrices(self, site: str) -> tuple[Tensor, ...]:
        """W at a site as float32 (O, I) matrices, in the order of `factors_of`; none where it is not stored whole."""
        if site not in self.places:
            return ()
        stored, geometry = self.places[site]
        W = self.checkpoint.read(stored)
        W = W.to(torch.promote_types(W.dtype, torch.float32))
        return matrix_views(W, geometry)


def matrix_views(W: Tensor, geometry: Geometry) -> tuple[Tensor, ...]:
    """A weight as its (O, I) matrices: one, or one for each of stacked experts."""
    if geometry.kind == "conv":
        return (W.flatten(1),)
    if geometry.kind == "embedding":
        return (W.t(),)
    stacked = W if W.dim() == 3 else W[None]
    return tuple(part.t() if geometry.transposed else part for part in stacked)


def open_weights(model: str | Path, adapter: Adapter, *, any_base: bool = False) -> BaseWeights:
    """The places of an adapter's sites in a base: a folder, a Hub id, "package:NAME" or a GGUF file (converted once).

    Raises BaseModelError, StateError or BaseMismatchError (names, shapes; weights unless `any_base`).
    """
    folder = base_folder(str(model), None)
    checkpoint, skeleton = read_checkpoint(folder), build_skeleton(folder, adapter)
    if skeleton is not None:
        adapter = store.settle_parameters(adapter, skeleton.parameters_of)
    plan = make_plan(adapter, checkpoint, skeleton)
    check_base(adapter, checkpoint, skeleton, plan, any_base=any_base)
    places = {output.edit.site: (output.base, output.edit.geometry) for output in plan.outputs
              if output.edit is not None and output.edit.geometry is not None and not output.edit.part_of
              and output.base is not None}
    return BaseWeights(folder, checkpoint, places)
