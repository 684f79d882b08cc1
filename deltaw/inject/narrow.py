"""Narrowing the sites that a config chose: exclusions, layers, slices; and checks that every pattern had an effect."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from torch import nn

from deltaw.core.config import LoraConfig, matches_suffix
from deltaw.core.geometry import Geometry
from deltaw.errors import Fault, near
from deltaw.inject.sites import Site, SiteMap


def names_match(pattern: str, site: Site) -> bool:
    """Whether one entry of a list names this site, or the attention module that hosts it."""
    names = {site.name, site.host} if site.kind == "attention" else {site.name}
    return any(name == pattern or name.endswith(f".{pattern}") for name in names)


def excluded(config: LoraConfig, chosen: dict[str, Site], sites: SiteMap, faults: list[Fault]) -> dict[str, Site]:
    """Sites that `exclude_modules` does not name."""
    patterns = config.exclude_modules
    if isinstance(patterns, str):
        out = {n for n in chosen if re.fullmatch(patterns, n)}
        unused = [patterns] if not out else []
    else:
        out, unused = set(), []
        for pattern in patterns:
            names = {n for n, s in chosen.items() if names_match(pattern, s)}
            out |= names
            if not names and not any(names_match(pattern, s) for s in sites.weights.values()):
                unused.append(pattern)
    faults.extend(unmatched("exclude_modules", pattern, sites) for pattern in unused)
    return {n: s for n, s in chosen.items() if n not in out}


def of_layers(config: LoraConfig, chosen: dict[str, Site], sites: SiteMap, faults: list[Fault]) -> dict[str, Site]:
    """Sites in the wanted layers: a layer is counted in the outermost list of modules that holds it."""
    if config.layers_to_transform is None:
        return chosen
    index = {n: _layer_index(n, config.layers_pattern, sites.modules) for n in chosen}
    present = {i for i in index.values() if i is not None}
    missing = [i for i in config.layers_to_transform if i not in present]
    if missing:
        faults.append(Fault("layers_to_transform", f"got {missing}", f"indices among {sorted(present)}"))
    return {n: s for n, s in chosen.items() if index[n] in config.layers_to_transform}


def _layer_index(name: str, patterns: Sequence[str], modules: Mapping[str, nn.Module]) -> int | None:
    parts = name.split(".")
    for i in range(1, len(parts)):
        holder = ".".join(parts[:i])
        is_list = isinstance(modules.get(holder), (nn.ModuleList, nn.Sequential))
        wanted = parts[i - 1] in patterns if patterns else isinstance(modules.get(holder), nn.ModuleList)
        if is_list and wanted and parts[i].isdigit():
            return int(parts[i])
    return None


def sliced(config: LoraConfig, site: Site, faults: list[Fault]) -> Geometry:
    """The site's geometry, narrowed to the slices that the config names for it."""
    for pattern, wanted in config.target_slices.items():
        if not matches_suffix(pattern, site.name):
            continue
        where, out = f"target_slices[{pattern!r}] at '{site.name}'", site.geometry.out_features
        if site.kind != "linear":
            faults.append(Fault(where, f"a site of kind {site.kind}", "a linear layer"))
            return site.geometry
        if isinstance(wanted, str):
            if not wanted or out % len(wanted) or set(wanted) == {"-"}:
                faults.append(Fault(where, f"got {wanted!r} for {out} outputs",
                                    "one letter for each equal part, '-' for parts left alone"))
                return site.geometry
            step = out // len(wanted)
            wanted = tuple((i * step, (i + 1) * step) for i, letter in enumerate(wanted) if letter != "-")
        ends = [0, *(edge for part in wanted for edge in part)]
        if not wanted or any(a > b for a, b in pairwise(ends)) or ends[-1] > out \
                or any(a == b for a, b in wanted):
            faults.append(Fault(where, f"got ranges {list(wanted)}", f"rising ranges within 0..{out}"))
            return site.geometry
        return replace(site.geometry, slices=wanted)
    return site.geometry


def check_dropout(config: LoraConfig, chosen: Mapping[str, Site], faults: list[Fault]) -> None:
    """Refuse dropout where a weight is changed as a whole, for there is no input to drop."""
    whole = next((s for s in chosen.values() if s.substituted), None)
    if config.lora_dropout and whole is not None:
        faults.append(Fault("lora_dropout", f"got {config.lora_dropout}, and '{whole.name}' is changed as a whole", "0",
                            "There is no input to drop: leave it out of the targets, or train without dropout"))


def check_patterns_used(config: LoraConfig, chosen: Mapping[str, Site], faults: list[Fault]) -> None:
    """Refuse patterns of ranks, alphas and slices that match none of the sites."""
    for option in ("rank_pattern", "alpha_pattern", "target_slices"):
        for pattern in getattr(config, option):
            if not any(matches_suffix(pattern, name) for name in chosen):
                faults.append(Fault(f"{option}[{pattern!r}]", "matches none of the chosen sites", "a site's name",
                                    near(pattern, suffixes(chosen))))


def unmatched(option: str, pattern: str, sites: SiteMap) -> Fault:
    """The fault of a pattern that names nothing, or something that has no weight to adapt."""
    module = next((m for n, m in sites.modules.items() if n == pattern or n.endswith(f".{pattern}")), None)
    if module is not None:
        return Fault(option, f"'{pattern}' is a {type(module).__name__}, which has no weight that can be adapted",
                     "a linear, convolution, embedding or attention module",
                     "Name the modules inside it, or use target_parameters")
    hint = near(pattern, suffixes(sites.weights))
    return Fault(option, f"'{pattern}' matches nothing", "a module's name or dotted suffix",
                 hint or f"Names here look like {examples(sites)}")


def suffixes(names: Iterable[str]) -> list[str]:
    """Last parts of names and whole names, for near matches."""
    return list(dict.fromkeys([*(n.rpartition(".")[2] for n in names), *names]))


def examples(sites: SiteMap) -> str:
    """Three names, to show what names look like in this model."""
    return ", ".join(list(sites.weights)[:3]) or "none: it has no adaptable module"
