"""What an adapter of PEFT's two files changes, found from the tensors' names and shapes and the config.

The files do not say everything. What they leave open is assumed, and told in `facts`, for the model to settle when the
adapter is added to one:

    transposed              experts are taken as (E, O, I); linear weights are transposed as `fan_in_fan_out` says
    unsettled_parameters    which adapted parameter of a module is which, if there are several: as in the config's order
    base_copies             digests of the base's own tensors, which PEFT stores for adapted embeddings
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deltaw.core.config import ALL_LINEAR, LoraConfig
from deltaw.core.geometry import Geometry
from deltaw.errors import Fault, near
from deltaw.store import names
from deltaw.store.factors import shared_groups
from deltaw.store.tensors import shown

_EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out", "shared")
"""Names of the embeddings that PEFT stores whole once the vocabulary was resized."""
_MAX_ORDERS = 5040
"""Orders of a module's parameters that are tried: all of seven."""
_OTHER_METHODS = {"lora_magnitude_vector": "DoRA", "trainable_tokens_delta": "trained tokens", "lora_diag": "KaSA"}


@dataclass(frozen=True, kw_only=True)
class Placed:
    """One site and where its tensors are in the file: `keys` by the site's own names for them."""

    geometry: Geometry
    keys: Mapping[str, str]
    rank: int = 0
    """The site's own rank, which can be less than the file's."""
    gain: float = 1.0


@dataclass(kw_only=True)
class Findings:
    """What is in a file: its sites, what else is to be known, and what is wrong."""

    sites: dict[str, Placed] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)


def infer(tensors: Mapping[str, Tensor], config: LoraConfig, *, fan_in_fan_out: bool,
          out_proj_gain: float) -> Findings:
    """The sites of a file whose keys are canonical; `out_proj_gain` is the gain of attentions' out_proj in it."""
    parsed = {key: names.parse(key) for key in tensors}
    inference = _Inference(tensors, parsed, config, fan_in_fan_out, out_proj_gain)
    for module in sorted(inference.factors, key=names.natural):
        inference.add_factors(module)
    for key, what in parsed.items():
        if not what.is_factor:
            inference.add_other(key, what)
    return inference.found


def parameter_geometry(A: Tensor, B: Tensor, rank: int) -> Geometry | None:
    """The geometry of a parameter with these factors, of one matrix or a stack; None if the rank does not fit A."""
    experts, rest = divmod(A.shape[0], rank)
    matrix = (B.shape[0], A.shape[1])
    return None if rest else Geometry(kind="parameter", shape=matrix if experts == 1 else (experts, *matrix))


class _Inference:
    """The file's factors by module and depth, and what has been found in them so far."""

    def __init__(self, tensors: Mapping[str, Tensor], parsed: Mapping[str, names.ParsedKey], config: LoraConfig,
                 fan_in_fan_out: bool, out_proj_gain: float) -> None:
        self.tensors, self.config = tensors, config
        self.fan_in_fan_out, self.out_proj_gain = fan_in_fan_out, out_proj_gain
        self.found = Findings()
        self.factors: dict[str, dict[int, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
        self.embeddings: set[str] = set()
        hosts: dict[str, set[str]] = defaultdict(set)
        for key, what in parsed.items():
            if what.is_factor:
                self.factors[what.module][what.depth][what.tensor] = key
                hosts[what.module] |= set(what.hosts)
                if what.embedding:
                    self.embeddings.add(what.module)
        self.attentions = {module for module in self.factors if self._is_attention(module, hosts)}

    def fault(self, key: str, got: str, expected: str = "", remedy: str = "") -> None:
        """Note that something is wrong with a tensor."""
        self.found.faults.append(Fault(f"tensor '{shown(key)}'", got, expected, remedy))

    def add_factors(self, module: str) -> None:
        """Add the sites of one adapted module: one, or one for each of its adapted parameters."""
        levels = self.factors[module]
        if not self._complete(levels):
            return
        keys = [levels[depth] for depth in sorted(levels, reverse=True)]  # innermost first
        parameters = self._candidates(module)
        if module in self.embeddings:
            self._add_embedding(module, keys[0])
        elif len(keys) > 1 or (parameters and not self._is_target(module)):
            self._add_parameters(module, keys, parameters)
        elif module in self.attentions:
            self._add_matrix(names.join(module, names.IN_PROJ), keys[0], attention=True)
        elif self._is_out_proj(module):
            self._add_matrix(module, keys[0], attention=True)
        elif self._A(keys[0]).ndim > 2:
            self._add_conv(module, keys[0])
        else:
            self._add_matrix(module, keys[0], attention=False)

    def add_other(self, key: str, what: names.ParsedKey) -> None:
        """Add a tensor that is no factor: a bias, a part of a saved module, or a copy of the base's own."""
        path = names.join(what.module, what.tensor)
        saved = names.outermost(what.module, self.config.modules_to_save) if what.module else None
        adapted = what.module in self.factors
        if "original_module" in what.module.split("."):
            self._add_base_copy(path.replace(".original_module", ""), key)
        elif saved and "modules_to_save" in path.removeprefix(saved).split("."):
            self._add_saved(saved, path.removeprefix(f"{saved}.modules_to_save.").removeprefix("default."), key)
        elif saved:
            self._add_saved(saved, path.removeprefix(f"{saved}."), key)
        elif self.config.bias != "none" and what.tensor.endswith("bias"):
            shape = tuple(self.tensors[key].shape)
            self.found.sites[path] = Placed(geometry=Geometry(kind="bias", shape=shape), keys={"bias": key})
        elif adapted and what.depth:
            self._add_base_copy(path, key)
        elif what.tensor in ("weight", "bias") and not adapted and names.split(what.module)[1] in _EMBEDDINGS:
            self._add_saved(what.module, what.tensor, key)
        else:
            self._unknown(key, what)

    def _unknown(self, key: str, what: names.ParsedKey) -> None:
        method = next((method for part, method in _OTHER_METHODS.items() if part in key), None)
        if method or (what.tensor == "bias" and what.module.endswith(("lora_A", "lora_B"))):
            self.fault(key, f"belongs to {method or 'a bias in lora_B'}, which is not supported yet")
        else:
            known = [other for levels in self.factors.values() for pair in levels.values() for other in pair.values()]
            self.fault(key, "is unknown", "factors, and tensors of modules_to_save or biases that the config names",
                       near(key, known, limit=1))

    def _complete(self, levels: Mapping[int, Mapping[str, str]]) -> bool:
        """Whether each level has an A and a B of numbers that fit each other, and no level is missing."""
        before = len(self.found.faults)
        for keys in levels.values():
            for factor, partner in (("lora_A", "lora_B"), ("lora_B", "lora_A")):
                if factor not in keys:
                    self.fault(keys[partner], f"has no {factor} beside it", "both factors", "The file is incomplete")
            for key in keys.values():
                tensor = self.tensors[key]
                if not tensor.is_floating_point() or tensor.ndim < 2 or not tensor.numel():
                    self.fault(key, f"is of {tensor.dtype} and shape {tuple(tensor.shape)}", "a matrix of real numbers")
        if sorted(levels) != list(range(len(levels))):
            key = next(iter(levels[max(levels)].values()))
            self.fault(key, f"lies in {max(levels)} base_layer", "a factor at each level outside it")
        return len(self.found.faults) == before

    def _A(self, keys: Mapping[str, str]) -> Tensor:
        return self.tensors[keys["lora_A"]]

    def _fit(self, keys: Mapping[str, str], fits: bool) -> bool:
        """Note a fault unless the factors fit each other."""
        if not fits:
            A, B = (tuple(self.tensors[keys[name]].shape) for name in ("lora_A", "lora_B"))
            self.fault(keys["lora_B"], f"of shape {B} does not fit lora_A of shape {A}", "the same rank in both")
        return fits

    def _add_matrix(self, site: str, keys: Mapping[str, str], *, attention: bool) -> None:
        A, B = self.tensors[keys["lora_A"]], self.tensors[keys["lora_B"]]
        if self._fit(keys, A.ndim == B.ndim == 2 and A.shape[0] == B.shape[1]):
            shape, transposed = (B.shape[0], A.shape[1]), self.fan_in_fan_out and not attention
            geometry = Geometry(kind="attention" if attention else "linear", transposed=transposed,
                                shape=shape[::-1] if transposed else shape)
            gain = self.out_proj_gain if attention and names.split(site)[1] == names.OUT_PROJ else 1.0
            self.found.sites[site] = Placed(geometry=geometry, keys=keys, rank=A.shape[0], gain=gain)

    def _add_embedding(self, site: str, keys: Mapping[str, str]) -> None:
        A, B = self.tensors[keys["lora_A"]], self.tensors[keys["lora_B"]]
        if self._fit(keys, A.ndim == B.ndim == 2 and A.shape[0] == B.shape[1]):
            geometry = Geometry(kind="embedding", shape=(A.shape[1], B.shape[0]))
            self.found.sites[site] = Placed(geometry=geometry, keys=keys, rank=A.shape[0])

    def _add_conv(self, site: str, keys: Mapping[str, str]) -> None:
        """Groups show in B, which has R/g columns; a grouped A is made the groups' shared one again where it was."""
        A, B = self.tensors[keys["lora_A"]], self.tensors[keys["lora_B"]]
        rank, groups = A.shape[0], A.shape[0] // B.shape[1]
        fits = (A.ndim == B.ndim <= 5 and set(B.shape[2:]) == {1} and groups * B.shape[1] == rank
                and not A.shape[1] % groups and not B.shape[0] % groups)
        if self._fit(keys, fits):
            shape = (B.shape[0], A.shape[1] // groups, *A.shape[2:])
            geometry = Geometry(kind="conv", shape=shape, groups=groups)
            if groups > 1 and shared_groups(A, groups) is not None:
                rank //= groups
            self.found.sites[site] = Placed(geometry=geometry, keys=keys, rank=rank)

    def _add_parameters(self, module: str, levels: list[dict[str, str]], parameters: list[str]) -> None:
        """Name the levels by the config's parameters of this module, in the first order that their ranks allow."""
        if len(levels) > len(parameters):
            self.fault(levels[0]["lora_A"], f"is one of {len(levels)} adapted parameters of '{shown(module)}'",
                       f"their names in target_parameters, which has {parameters}")
            return
        pairs = [(self.tensors[keys["lora_A"]], self.tensors[keys["lora_B"]]) for keys in levels]
        fit = [self._fit(keys, A.ndim == B.ndim == 2 and A.shape[0] == B.shape[1])
               for keys, (A, B) in zip(levels, pairs, strict=True)]
        if not all(fit):
            return
        for order in itertools.islice(itertools.permutations(parameters, len(levels)), _MAX_ORDERS):
            sites = [names.join(module, parameter) for parameter in order]
            ranks = [self.config.rank_at(site) for site in sites]
            found = [parameter_geometry(A, B, rank) for (A, B), rank in zip(pairs, ranks, strict=True)]
            geometries = [geometry for geometry in found if geometry is not None]
            if len(geometries) == len(levels):
                break
        else:
            rows = [A.shape[0] for A, _ in pairs]
            self.fault(levels[0]["lora_A"], f"and the module's others have {rows} rows",
                       f"multiples of the config's ranks for {', '.join(parameters)}",
                       "The config does not belong to these tensors, or lacks a rank_pattern")
            return
        if len(parameters) > 1:
            unsettled = self.found.facts.setdefault("unsettled_parameters", {})
            unsettled[module] = {"sites": sites, "candidates": parameters}
        for site, geometry, keys, rank in zip(sites, geometries, levels, ranks, strict=True):
            self.found.sites[site] = Placed(geometry=geometry, keys=keys, rank=rank)

    def _add_saved(self, module: str, tensor: str, key: str) -> None:
        known = self.found.sites.get(module)
        if known is not None and known.geometry.kind != "saved":
            self.fault(key, "belongs to a module that is adapted too", "a module saved whole or adapted")
            return
        keys = {**(known.keys if known else {}), tensor: key}
        size = sum(self.tensors[key].numel() for key in keys.values())
        self.found.sites[module] = Placed(geometry=Geometry(kind="saved", shape=(size,)), keys=keys)

    def _add_base_copy(self, path: str, key: str) -> None:
        tensor = self.tensors[key].contiguous().view(-1).view(torch.uint8)
        copies = self.found.facts.setdefault("base_copies", {})
        copies[path] = hashlib.sha256(tensor.numpy().data).hexdigest()

    def _is_attention(self, module: str, hosts: Mapping[str, set[str]]) -> bool:
        """Whether a module is an attention: its out_proj lies inside its wrapper, and it makes 3 outputs of 1 input."""
        pair, inner = self.factors[module].get(0, {}), names.join(module, names.OUT_PROJ)
        if module not in hosts.get(inner, ()) or len(pair) != 2:
            return False
        A, B = self.tensors[pair["lora_A"]], self.tensors[pair["lora_B"]]
        return A.ndim == B.ndim == 2 and B.shape[0] == 3 * A.shape[1] and (
            not self._candidates(module) or self._is_target(module))

    def _is_out_proj(self, module: str) -> bool:
        host, last = names.split(module)
        return last == names.OUT_PROJ and host in self.attentions

    def _is_target(self, module: str) -> bool:
        targets = self.config.target_modules
        if isinstance(targets, str):
            return targets == ALL_LINEAR or re.fullmatch(targets, module) is not None
        return names.matches_target(module, targets)

    def _candidates(self, module: str) -> list[str]:
        """The parameters of a module that `target_parameters` can mean."""
        split = (names.split(target) for target in self.config.target_parameters)
        return [last for owner, last in split if not owner or names.matches_target(module, [owner])]
