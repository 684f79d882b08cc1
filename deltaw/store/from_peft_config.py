"""From PEFT's `adapter_config.json` to `LoraConfig`, with every fault of the file at once.

What deltaw cannot do as PEFT would is refused, never ignored: an option that changes what the tensors mean, and one
that deltaw has not heard of, unless it is switched off.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deltaw.core.config import ALL_LINEAR, LoraConfig
from deltaw.errors import AdapterFileError, ConfigError, Fault, near
from deltaw.store.factors import OUT_PROJ_COUNTS, OUT_PROJ_TWICE_UNTIL
from deltaw.store.tensors import shown

PEFT_RANK, PEFT_ALPHA = 8, 8
"""What PEFT takes for an absent r and lora_alpha."""

_UNSUPPORTED = {
    "use_dora": "DoRA", "lora_bias": "a bias in lora_B", "trainable_token_indices": "trained tokens",
    "layer_replication": "replicated layers", "alora_invocation_tokens": "activated LoRA", "use_qalora": "QA-LoRA",
    "velora_config": "VeLoRA", "monteclora_config": "Monte Carlo LoRA", "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing", "kasa_config": "KaSA", "megatron_config": "Megatron layers",
}
"""Options of PEFT that change what the tensors mean."""

_WITHOUT_EFFECT = frozenset((
    "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "fan_in_fan_out", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "qalora_group_size", "runtime_config", "ensure_weight_tying", "parent_library",
))
"""Options of PEFT that do not change what the tensors mean, or that are read elsewhere."""

_KEPT_INITS = (True, False, "gaussian")
_HARMLESS_INITS = ("eva", "orthogonal", "mica")
"""Initialisations that leave the base's weights as they are, so that nothing of them matters once it is trained."""


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _texts(value: Any) -> bool:
    return value is None or isinstance(value, str) or (isinstance(value, list) and all(map(_text, value)))


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 48


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _by_text(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, dict) and all(map(check, value.values())))


def _layers(value: Any) -> bool:
    return value is None or _whole(value) or (isinstance(value, list) and all(map(_whole, value)))


FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_whole, "a whole number"), "lora_alpha": (_number, "a number"), "lora_dropout": (_number, "a number"),
    "target_modules": (_texts, "names or a regular expression"), "target_parameters": (_texts, "names"),
    "exclude_modules": (_texts, "names or a regular expression"), "layers_to_transform": (_layers, "layer indices"),
    "layers_pattern": (_texts, "names"), "rank_pattern": (_by_text(_whole), "a rank for each pattern"),
    "alpha_pattern": (_by_text(_number), "a number for each pattern"), "use_rslora": (_flag, "true or false"),
    "bias": (_text, '"none", "all" or "lora_only"'), "modules_to_save": (_texts, "names"),
    "init_lora_weights": (lambda value: _flag(value) or _text(value), "true, false or a name"),
    "task_type": (lambda value: value is None or _text(value), "a name"),
}
"""The options that `LoraConfig` has too: what a value must be, and how to say it."""


def from_peft(options: Mapping[str, Any], path: Path) -> LoraConfig:
    """The config that PEFT's options describe, with PEFT's defaults for absent ones.

    `AdapterFileError` lists every option that is of another method, not supported, unknown or malformed.
    """
    method = options.get("peft_type", "LORA")
    if method != "LORA":
        got = "has no method" if method is None else f"is an adapter of the method {shown(str(method))}"
        raise AdapterFileError(Fault(f"{path}: peft_type", got, "LORA", "deltaw reads only LoRA adapters of PEFT"))
    faults = [fault for name, value in options.items() if (fault := option_fault(name, value, path))]
    if faults:
        raise AdapterFileError(*faults)
    known = {name: value for name, value in options.items() if name in FIELDS and value is not None}
    known = {"r": PEFT_RANK, "lora_alpha": PEFT_ALPHA, "target_modules": ()} | known
    if known.get("init_lora_weights") in _HARMLESS_INITS:
        known["init_lora_weights"] = True
    if isinstance(known["target_modules"], str) and known["target_modules"].lower() == ALL_LINEAR:
        known["target_modules"] = ALL_LINEAR
    try:
        return LoraConfig.from_dict(known)
    except ConfigError as error:
        raise AdapterFileError(*(in_file(path, fault) for fault in error.faults)) from error


def out_proj_counts(options: Mapping[str, Any]) -> float:
    """How often the PEFT that wrote this config adds the change of an attention's out_proj."""
    version = options.get("peft_version")  # absent in old ones
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", version) if isinstance(version, str) and len(version) < 100 else None
    fixed = numbers is not None and tuple(map(int, numbers.groups())) > OUT_PROJ_TWICE_UNTIL
    return 1.0 if fixed else OUT_PROJ_COUNTS


def _regex_fault(pattern: str) -> str | None:
    """Why a regular expression does not parse, or None if it does."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return str(error)
    return None


def option_fault(name: str, value: Any, path: Path) -> Fault | None:
    """What is wrong with one option of a config file, or None."""
    where = f"{path}: {shown(name)}"
    if name in FIELDS:
        check, expected = FIELDS[name]
        if not check(value) and value is not None:
            return Fault(where, f"is {shown(repr(value))}", expected)
        return _pattern_fault(name, value, where) or _init_fault(name, value, where)
    if not value or name in _WITHOUT_EFFECT:
        return None
    if name in _UNSUPPORTED:
        return Fault(where, f"asks for {_UNSUPPORTED[name]}, which is not supported yet", "",
                     "Merge the adapter with PEFT, or train it again without this option")
    return Fault(where, f"is an unknown option, set to {shown(repr(value))}", "options of PEFT's LoRA",
                 near(name, [*FIELDS, *_WITHOUT_EFFECT, *_UNSUPPORTED]))


def _pattern_fault(name: str, value: Any, where: str) -> Fault | None:
    """A fault if an option holds a regular expression that does not parse."""
    if name in ("rank_pattern", "alpha_pattern"):
        patterns = [rf"(.*\.)?({pattern})$" for pattern in value or ()]  # as they are matched
    else:
        patterns = [value] if name in ("target_modules", "exclude_modules") and isinstance(value, str) else []
    for pattern in patterns:
        why = _regex_fault(pattern)
        if why:
            got = f"has the pattern {shown(repr(pattern))}"
            return Fault(where, got, "a regular expression", f"It does not parse: {why}")
    return None


def _init_fault(name: str, value: Any, where: str) -> Fault | None:
    if name != "init_lora_weights" or value is None or value in (*_KEPT_INITS, *_HARMLESS_INITS):
        return None
    return Fault(where, f"is {shown(repr(value))}, which changes the base's own weights", "an adapter to the base",
                 "Save it from PEFT with path_initial_model_for_weight_conversion, which makes it a plain LoRA adapter")


def in_file(path: Path, fault: Fault | str) -> Fault | str:
    """The fault with the file's path before its place."""
    if not isinstance(fault, Fault):
        return f"{path}: {fault}"
    return Fault(f"{path}: {fault.where}", fault.got, fault.expected, fault.remedy)
