"""From `LoraConfig` to PEFT's `adapter_config.json`.

Written so that PEFT, and what reads PEFT's files, finds exactly the adapter's sites with their ranks and scales. What
deltaw's config says beyond that is kept in `deltaw.json`.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from deltaw.core.config import ALL_LINEAR, LoraConfig, matches_suffix
from deltaw.store import names

Number = int | float
Strength = tuple[int, float]
"""A rank and an alpha."""


_UNUSED: dict[str, Any] = {
    "auto_mapping": None, "corda_config": None, "eva_config": None, "layer_replication": None, "layers_pattern": None,
    "layers_to_transform": None, "loftq_config": {}, "lora_bias": False, "megatron_config": None,
    "megatron_core": "megatron.core", "trainable_token_indices": None, "use_dora": False,
}
"""Options that every reader of PEFT's configs knows, as they are where they have no effect."""


def to_peft(config: LoraConfig, modules: Mapping[str, Strength], parameters: Mapping[str, Strength], *,
            transposed: bool, facts: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's config for an adapter of these modules and parameters, each with its rank and alpha in the file."""
    wanted = {**modules, **parameters}
    r, rank_pattern = _patterns(config.r, config.rank_pattern, {name: rank for name, (rank, _) in wanted.items()})
    alpha, alpha_pattern = _patterns(config.lora_alpha, config.alpha_pattern,
                                     {name: alpha for name, (_, alpha) in wanted.items()})
    target_modules, exclude = _target_modules(config, list(modules))
    of_adapter = {
        "peft_type": "LORA", "task_type": config.task_type, "inference_mode": True, "init_lora_weights": True,
        "base_model_name_or_path": facts.get("base_model"), "revision": facts.get("revision"),
        "r": r, "lora_alpha": alpha, "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern,
        "use_rslora": config.use_rslora, "bias": config.bias, "modules_to_save": list(config.modules_to_save) or None,
        "target_modules": target_modules, "exclude_modules": exclude,
        "target_parameters": _target_parameters(config, list(parameters)),
        # PEFT refuses an adapted parameter with either of these two set; it finds out about Conv1D by itself.
        "fan_in_fan_out": transposed and not parameters, "lora_dropout": 0.0 if parameters else config.lora_dropout,
    }
    return _UNUSED | of_adapter


def with_exact(config: LoraConfig, wanted: Mapping[str, Strength]) -> LoraConfig:
    """The config with patterns added where it does not give these ranks and alphas at these sites."""
    ranks = {exactly(site): rank for site, (rank, _) in wanted.items() if config.rank_at(site) != rank}
    alphas = {exactly(site): alpha for site, (_, alpha) in wanted.items() if config.alpha_at(site) != alpha}
    if not ranks and not alphas:
        return config
    patterns = {"rank_pattern": {**ranks, **config.rank_pattern, **ranks},  # the first match counts
                "alpha_pattern": {**alphas, **config.alpha_pattern, **alphas}}
    return LoraConfig.from_dict(config.to_dict() | patterns)


def alpha_for(scale: float, rank: int, *, rslora: bool) -> Number:
    """The alpha that gives this scale at this rank."""
    return _plain(scale * (math.sqrt(rank) if rslora else rank))


def exactly(name: str) -> str:
    """A pattern for this one name: a name alone would also match longer ones that end in it."""
    return "^" + re.escape(name)


def _plain(value: Number) -> Number:
    return int(value) if float(value).is_integer() else value


def _patterns(default: Number, patterns: Mapping[str, Number],
              wanted: Mapping[str, Number]) -> tuple[Number, dict[str, Number]]:
    """PEFT's default and patterns that give the wanted values: the config's own if they do, else exact ones."""
    def given(name: str) -> Number:
        return next((value for pattern, value in patterns.items() if matches_suffix(pattern, name)), default)

    used = all(any(matches_suffix(pattern, name) for name in wanted) for pattern in patterns)
    if used and all(given(name) == value for name, value in wanted.items()):
        return _plain(default), {pattern: _plain(value) for pattern, value in patterns.items()}
    if default not in wanted.values():
        default = Counter(wanted.values()).most_common(1)[0][0]
    return _plain(default), {exactly(name): _plain(value) for name, value in wanted.items() if value != default}


def _target_modules(config: LoraConfig, modules: Sequence[str]) -> tuple[list[str] | str, list[str] | str | None]:
    """PEFT's target_modules and exclude_modules: the config's own where PEFT reads them alike, else the sites'."""
    targets, exclude = config.target_modules, config.exclude_modules
    if not modules:
        return [], None  # None would have PEFT choose modules by the model's type
    if config.layers_to_transform is None and targets != ALL_LINEAR:
        kept = exclude if isinstance(exclude, str) else list(exclude)
        if isinstance(targets, str):
            if all(re.fullmatch(targets, name) for name in modules):
                return targets, kept or None
        elif (all(names.matches_target(name, targets) for name in modules)
              and all(any(names.matches_target(name, [target]) for name in modules) for target in targets)):
            return sorted(targets), kept or None
    whole = targets == ALL_LINEAR and not exclude and config.layers_to_transform is None
    return (_short_names(modules) if whole else sorted(modules)), None


def _short_names(modules: Sequence[str]) -> list[str]:
    """The last parts of the names that all layers share, and whole names for the rest.

    A last part alone would catch modules of that name in layers that were left alone, so it stands for its modules only
    if they are in every layer counted from 0.
    """
    leaves: dict[str, list[str]] = defaultdict(list)
    for name in modules:
        leaves[names.split(name)[1]].append(name)
    short = [[leaf] if _every_layer(leaf, group) else group for leaf, group in leaves.items()]
    return sorted(itertools.chain.from_iterable(short))


def _every_layer(leaf: str, group: Sequence[str]) -> bool:
    """Whether these names are one pattern, or several, with each number from 0 to its largest."""
    if leaf.isdecimal() or len(group) == 1:
        return False
    numbers: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for name in group:
        parts = name.split(".")
        template = ".".join("#" if part.isdecimal() else part for part in parts)
        numbers[template].add(tuple(int(part) for part in parts if part.isdecimal()))
    return all(math.prod(max(column) + 1 for column in zip(*found, strict=True)) == len(found)
               for found in numbers.values())


def _target_parameters(config: LoraConfig, parameters: Sequence[str]) -> list[str] | None:
    """PEFT's target_parameters: the config's own where they name these parameters and no others, else whole names."""
    targets = config.target_parameters
    plain = config.layers_to_transform is None and not config.exclude_modules
    fit = all(names.matches_target(name, targets) for name in parameters)
    used = all(any(names.matches_target(name, [target]) for name in parameters) for target in targets)
    return (list(targets) if plain and fit and used else list(parameters)) or None
