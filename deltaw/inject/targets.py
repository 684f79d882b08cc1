"""From a config to the places of one model: which sites, at which rank, and what else is trained.

Every pattern must match. One that does not is an error with the nearest names; all faults are reported at once, and
nothing is changed here: the result is a plan.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import nn

from deltaw.core.config import ALL_LINEAR, LoraConfig
from deltaw.core.geometry import Geometry
from deltaw.core.packed import Int8Rows, holds_codes
from deltaw.errors import Fault, TargetError, near
from deltaw.inject.narrow import (
    check_dropout,
    check_patterns_used,
    examples,
    excluded,
    names_match,
    of_layers,
    sliced,
    suffixes,
    unmatched,
)
from deltaw.inject.sites import Site, SiteMap


@dataclass(frozen=True, slots=True)
class Target:
    """One site that a config changes. `rank` is 0 for a bias or a module trained in full."""

    site: Site
    rank: int
    alpha: float
    scaling: float

    @property
    def parameters(self) -> int:
        """Number of trained values."""
        return self.site.geometry.count(self.rank)


def factors_as_drawn(targets: Iterable[Target]) -> set[str]:
    """Names of the factors that LoRA-FA (Zhang et al. 2023) leaves as they were drawn: every A but an embedding's.

    That one starts at zero, and its B would never get a gradient.
    """
    return {f"{t.site.name}.lora_A" for t in targets if t.rank and t.site.geometry.kind != "embedding"}


def resolve(config: LoraConfig, model: nn.Module, sites: SiteMap, *, made_before: bool = False) -> list[Target]:
    """The plan of a config on a model: low-rank sites in the model's order, then biases, then saved modules.

    For an adapter `made_before`, patterns of ranks, alphas and exclusions need not match: its tensors tell.
    """
    faults: list[Fault] = []
    saved = _saved_modules(config, model, sites, faults)
    chosen = {**_chosen_weights(config, model, sites, faults), **_chosen_parameters(config, sites, faults)}
    inside = tuple(f"{name}." for name in saved)
    chosen = {name: s for name, s in chosen.items() if s.host not in saved and not s.host.startswith(inside)}
    chosen = excluded(config, chosen, sites, [] if made_before else faults)
    chosen = of_layers(config, chosen, sites, faults)
    if config.target_slices:
        chosen = {name: replace(s, geometry=sliced(config, s, faults)) for name, s in chosen.items()}
    check_dropout(config, chosen, faults)
    if not made_before:
        check_patterns_used(config, chosen, faults)
    if not chosen and not faults and not saved:
        faults.append(Fault("targets", "no site is left after exclude_modules and layers_to_transform", "at least one"))
    if faults:
        raise TargetError(*faults)
    targets = [_target(config, site) for site in chosen.values()]
    if not made_before:
        _warn_of_high_ranks(targets)
    plain = [_bias_sites(config, chosen, sites), (saved_site(name, sites.modules[name]) for name in saved)]
    return targets + [Target(site, 0, 0.0, 1.0) for group in plain for site in group]


def _target(config: LoraConfig, site: Site) -> Target:
    rank = config.rank_at(site.name)
    return Target(site, rank, config.alpha_at(site.name), config.scaling(rank, site.name))


def _warn_of_high_ranks(targets: Iterable[Target]) -> None:
    high = [t for t in targets if t.rank > t.site.geometry.max_rank]
    if high:
        t = high[0]
        more = f" (and {len(high) - 1} more sites)" if len(high) > 1 else ""
        warnings.warn(f"site '{t.site.name}'{more}: rank {t.rank} exceeds min(in, out) = {t.site.geometry.max_rank}; "
                      "ranks above it add parameters and no expressiveness", stacklevel=2)


def _chosen_weights(config: LoraConfig, model: nn.Module, sites: SiteMap, faults: list[Fault]) -> dict[str, Site]:
    targets = config.target_modules
    if targets == ALL_LINEAR or targets == (ALL_LINEAR,):
        return _all_linear(config, model, sites, faults)
    if isinstance(targets, str):
        found = {n: s for n, s in sites.weights.items() if re.fullmatch(targets, n) or
                 (s.kind == "attention" and re.fullmatch(targets, s.host))}
        if not found:
            faults.append(Fault("target_modules", f"the regular expression {targets!r} matches no adaptable module",
                                "a match of the whole dotted name", f"Names here look like {examples(sites)}"))
        return found
    found = {}
    for pattern in targets:
        matches = {n: s for n, s in sites.weights.items() if names_match(pattern, s)}
        if not matches:
            faults.append(unmatched("target_modules", pattern, sites))
        found |= matches
    return {name: site for name, site in sites.weights.items() if name in found}


def _all_linear(config: LoraConfig, model: nn.Module, sites: SiteMap, faults: list[Fault]) -> dict[str, Site]:
    """All linear layers; of a transformers model those of its body, so that heads stay as they are (or are saved)."""
    body = _body_prefix(model, sites)
    found = {n: s for n, s in sites.weights.items()
             if s.kind in ("linear", "attention") and (s.host == body or s.host.startswith(f"{body}.") or not body)}
    if not found and not config.target_parameters and not config.modules_to_save:
        faults.append(_codes_alone(sites) or Fault(
            "target_modules", "'all-linear' finds no linear layer in this model", "at least one",
            f"Name the modules, such as {examples(sites)}"))
    return found


def _codes_alone(sites: SiteMap) -> Fault | None:
    """What to say of a base whose linear layers hold a quantizer's codes and no weight."""
    kinds = sorted({type(module).__name__ for module in sites.modules.values() if holds_codes(module)})
    if not kinds:
        return None
    return Fault("target_modules", f"'all-linear' finds no weight in this model's linear layers ({', '.join(kinds)}), "
                 "which hold a quantizer's codes", "a base in 16 or 32 bits, or packed by bitsandbytes or torchao",
                 "Give the unquantized base, with quantize='nf4' to hold it in 4 bits")


def _body_prefix(model: nn.Module, sites: SiteMap) -> str:
    """The name of a transformers model's body below its heads, or "" where there is none."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel) or model.base_model is model:
        return ""
    return next((name for name, module in sites.modules.items() if module is model.base_model), "")


def _chosen_parameters(config: LoraConfig, sites: SiteMap, faults: list[Fault]) -> dict[str, Site]:
    """Parameters named directly; a linear layer's own weight is that layer's site."""
    known = dict(sites.parameters)
    known |= {f"{s.name}.weight": s for s in sites.weights.values()
              if s.kind == "linear" and not s.geometry.transposed}
    found: dict[str, Site] = {}
    for pattern in config.target_parameters:
        matches = [s for n, s in known.items() if n == pattern or n.endswith(f".{pattern}")]
        if not matches:
            hint = near(pattern, suffixes(known)) or f"Names here look like {', '.join(list(known)[:3])}"
            faults.append(Fault("target_parameters", f"'{pattern}' matches no 2-D or 3-D parameter",
                                "a parameter's name", hint))
        found |= {s.name: s for s in matches}
    return found


def _saved_modules(config: LoraConfig, model: nn.Module, sites: SiteMap, faults: list[Fault]) -> list[str]:
    """Modules trained in full; for a classifier without any named, the heads that its body does not contain."""
    found = []
    for pattern in config.modules_to_save:
        matches = [n for n in sites.modules if n and (n == pattern or n.endswith(f".{pattern}"))]
        if not matches:
            faults.append(Fault("modules_to_save", f"'{pattern}' matches no module", "a module's name",
                                near(pattern, suffixes(sites.modules))))
        found.extend(matches)
        faults += [Fault("modules_to_save", f"'{name}' holds a table in 8 bits, which has no gradient",
                         "a module in 16 or 32 bits", "Load the base without quantize_tables, or name it in "
                         "target_modules, for a low-rank change beside it") for name in matches
                   if any(isinstance(p, Int8Rows) for p in sites.modules[name].parameters())]
    if config.task_type == "SEQ_CLS" and not config.modules_to_save:
        body = _body_prefix(model, sites)
        found = [n for n, m in sites.modules.items()
                 if body and n and "." not in n and n != body and next(m.parameters(), None) is not None]
    return list(dict.fromkeys(found))


def _bias_sites(config: LoraConfig, chosen: Mapping[str, Site], sites: SiteMap) -> Iterable[Site]:
    if config.bias == "none":
        return
    hosts = {s.host for s in chosen.values()}
    for name, module in sites.modules.items():
        attention = name.rpartition(".")[0] if isinstance(sites.modules.get(name.rpartition(".")[0]),
                                                          nn.MultiheadAttention) else None
        host = name if attention is None else attention
        if config.bias == "lora_only" and host not in hosts:
            continue
        for leaf, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() == 1 and (leaf == "bias" or leaf.endswith("_bias")):
                path = leaf if attention is None else f"{name.rpartition('.')[2]}.{leaf}"
                yield Site(f"{name}.{leaf}" if name else leaf, host, path,
                           Geometry(kind="bias", shape=tuple(parameter.shape)))


def saved_site(name: str, module: nn.Module) -> Site:
    """A module trained in full, as a site."""
    size = sum(p.numel() for p in module.parameters())
    return Site(name, name, "", Geometry(kind="saved", shape=(size,)))
