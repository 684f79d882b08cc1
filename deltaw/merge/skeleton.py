"""The live model of a folder without its weights: names, shapes and ties, as transformers would have them in memory.

Names on disk can differ from those in memory: a body saved without its head's prefix, names of an older release,
experts stored one by one that are stacked when loaded. An adapter is made in memory and speaks memory's names. The
skeleton is the model on the meta device, and transformers' own rules are applied to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaw.bases.quiet import quiet_transformers
from deltaw.core import Adapter, Geometry
from deltaw.inject import find_sites

_HEADS = {"SEQ_CLS": "AutoModelForSequenceClassification", "CAUSAL_LM": "AutoModelForCausalLM"}


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A model on the meta device, with what there is to know about its tensors."""

    model: Any
    shapes: Mapping[str, tuple[int, ...]]
    """All tensors that a checkpoint of this model can hold, tied ones under each of their names."""
    geometries: Mapping[str, Geometry]
    """How each adaptable weight is read, by the tensor's name."""
    names: Mapping[str, str]
    """The tensor's name of each site."""
    tied: Mapping[str, str]
    """Names of tied tensors, and of those that they are tied to; empty where the config ties nothing."""

    def parameters_of(self, module: str) -> list[str]:
        """The names of a module's own parameters, in its order."""
        found = dict(self.model.named_modules()).get(module)
        return [] if found is None else list(found._parameters)

    def parameters(self) -> list[tuple[str, Tensor]]:
        """The parameters by name, each once, as a live model gives them."""
        return list(self.model.named_parameters())

    def pieces(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """A tensor of this name as checkpoints store it: by other names, and in several parts where it was stacked."""
        from transformers.core_model_loading import revert_weight_conversion

        stored: dict[str, Tensor] = revert_weight_conversion(self.model, {name: tensor})
        return stored

    def live_names(self, stored: Sequence[str]) -> dict[str, tuple[str, bool]]:
        """For each name on disk the one in memory, and whether that tensor is put together from several."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        rules = get_model_conversion_mapping(self.model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        known = self.model.state_dict()
        found = {}
        for name in stored:
            live, converter = rename_source_key(name, renamings, converters, self.model.base_model_prefix, known)
            found[name] = (live, converter is not None)
        return found


def build_skeleton(folder: Path, adapter: Adapter) -> Skeleton | None:
    """A folder's model with the head that an adapter was made for; None if transformers has no class for it."""
    import transformers

    try:
        with quiet_transformers():
            config = transformers.AutoConfig.from_pretrained(folder)
            count = _labels(adapter)
            if count:
                config.num_labels = count
            kind = _model_class(transformers, config, adapter.config.task_type)
            with torch.device("meta"):
                model = kind.from_config(config) if kind.__name__.startswith("Auto") else kind(config)
    except Exception:  # an unknown architecture, or code of its own: each fails in its own way
        return None
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    sites = find_sites(model)
    geometries, names = {}, {}
    for site in (*sites.weights.values(), *sites.parameters.values()):
        names[site.name] = f"{site.host}.{site.parameter}" if site.host else site.parameter
        geometries[names[site.name]] = site.geometry
    return Skeleton(model, shapes, geometries, names, dict(model.all_tied_weights_keys))


def _model_class(transformers: Any, config: Any, task: str | None) -> Any:
    if task in _HEADS:
        return getattr(transformers, _HEADS[task])
    for name in config.architectures or ():
        if isinstance(getattr(transformers, name, None), type):
            return getattr(transformers, name)
    return transformers.AutoModel


def recorded_labels(adapter: Adapter) -> list[str]:
    """The names of a classifier's classes as the training recorded them; empty where it did not."""
    found: Any = adapter.facts
    for key in ("training", "data", "labels"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return [str(label) for label in found] if isinstance(found, (list, tuple)) else []


def _labels(adapter: Adapter) -> int | None:
    """How many classes a classifier tells apart: as recorded, or the rows of its saved head's last matrix."""
    if adapter.config.task_type != "SEQ_CLS":
        return None
    if recorded := recorded_labels(adapter):
        return len(recorded)
    rows = [tensor.shape[0] for site in adapter.sites.values() if site.geometry.kind == "saved"
            for tensor in site.tensors.values() if tensor.dim() == 2]
    return rows[-1] if rows else None
