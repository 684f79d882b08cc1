"""A method's folder: what it learned, and what it takes to put it on the base again.

    tuning.json             method, options, seed, facts, the base's fingerprint
    tuning.safetensors      the tensors by name
or, where PEFT has the same method (prompt tuning, prefix tuning),
    adapter_config.json, adapter_model.safetensors     PEFT's own files, beside tuning.json

LoRA alone is PEFT's folder with `deltaw.json`, as everywhere. No pickle; folders are replaced whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from deltaw import __version__, store
from deltaw.baselines.config import BaselineConfig, trains_lora, virtual_tokens
from deltaw.baselines.methods import METHODS
from deltaw.baselines.peft_files import PROMPT, peft_config
from deltaw.baselines.tuned import Baseline, Recipe, check_base
from deltaw.core import LoraConfig
from deltaw.errors import AdapterFileError, ConfigError, Fault
from deltaw.store.atomic import replace_folder, settled
from deltaw.store.locate import CONFIG_FILE, RECORD_FILE, TENSORS_FILE
from deltaw.store.tensors import read_tensors, to_bytes

FORMAT = 1
RECORD, TENSORS = "tuning.json", "tuning.safetensors"
FILES = (RECORD, TENSORS, CONFIG_FILE, TENSORS_FILE, RECORD_FILE)
"""Every file that a method may write."""


@dataclass(frozen=True, kw_only=True)
class SavedBaseline:
    """What a folder holds: a method with its values, and no model."""

    recipe: Recipe
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> BaselineConfig:
        """The method's options."""
        return self.recipe.config

    @property
    def takes_positions(self) -> int:
        """How many of the base's positions it takes."""
        return virtual_tokens(self.recipe.method, self.recipe.config)

    def put_on(self, model: nn.Module, *, any_base: bool = False) -> Baseline:
        """The method on a model, with the saved values, on and frozen.

        `BaseMismatchError` where the model is not the base that they were made for; `any_base` skips that check.
        """
        recipe = self.recipe
        config = BaselineConfig(**{**recipe.config.to_dict(), "prefix_hidden": None})  # the MLP was folded away
        lora = recipe.lora if trains_lora(recipe.method) else None
        tuned = METHODS[recipe.method](model, config, recipe.seed, lora=lora)
        try:
            if not any_base and isinstance(self.facts.get("base"), dict):
                check_base(self.facts["base"], tuned)
            tuned.put(self.tensors)
        except BaseException:
            tuned.remove()
            raise
        tuned.facts = dict(self.facts)
        for parameter in tuned.parameters().values():
            parameter.requires_grad_(False)
        return tuned


def save(tuned: Baseline, path: str | Path) -> None:
    """Write a method's folder; a folder that is already there is replaced in one step, other files in it kept."""
    recipe = tuned.recipe
    if recipe.method == "lora":
        assert tuned.board is not None
        tuned.board.note("default", **tuned.facts)
        tuned.board.adapter("default").save(path)
        return
    values = tuned.values()
    facts = {**tuned.facts, "base": tuned.fingerprint(head=False).to_dict()}
    about = {"format": FORMAT, "deltaw": __version__, "method": recipe.method, "seed": recipe.seed,
             "options": recipe.config.to_dict(), "lora": recipe.lora.to_dict() if trains_lora(recipe.method) else None,
             "facts": facts}
    files = {RECORD: json.dumps(about, indent=1).encode()}
    options = peft_config(tuned)
    if options is None:
        files[TENSORS] = to_bytes(values, path)
    else:
        (value,) = values.values()
        files |= {CONFIG_FILE: json.dumps(options, indent=2, sort_keys=True).encode(),
                  TENSORS_FILE: to_bytes({PROMPT: value}, path)}
    replace_folder(path, files)


def names(tuned: Baseline) -> tuple[str, ...]:
    """The files that `save` writes for it."""
    if tuned.recipe.method == "lora":
        return CONFIG_FILE, TENSORS_FILE, RECORD_FILE
    return (RECORD, TENSORS) if peft_config(tuned) is None else (RECORD, CONFIG_FILE, TENSORS_FILE)


def is_baseline(path: str | Path) -> bool:
    """Whether a local folder holds another method than LoRA."""
    return (settled(Path(path)) / RECORD).is_file()


def read(path: str | Path) -> SavedBaseline:
    """What a method's folder holds; `AdapterFileError` says what is wrong with it."""
    folder = settled(Path(path))
    about = _record(folder / RECORD)
    try:
        lora = LoraConfig.from_dict(about["lora"]) if about["lora"] is not None else LoraConfig()
        recipe = Recipe(method=about["method"], config=BaselineConfig.from_dict(about["options"]), lora=lora,
                        seed=about["seed"])
        faults = recipe.config.faults(recipe.method)
        if faults:
            raise ConfigError(*faults)
    except (ConfigError, KeyError, TypeError) as error:
        raise AdapterFileError(Fault(str(folder / RECORD), f"is malformed ({error})", "what deltaw writes")) from error
    own = (folder / TENSORS).is_file()
    place = folder / (TENSORS if own else TENSORS_FILE)
    if not place.is_file():
        raise AdapterFileError(Fault(str(folder), f"has no {TENSORS}", "the tensors beside tuning.json"))
    tensors = read_tensors(place)
    if not own:
        name = "past.prefix" if recipe.config.prefix_form == "past" else "tokens.0"
        tensors = {name if key == PROMPT else key: tensor for key, tensor in tensors.items()}
    return SavedBaseline(recipe=recipe, tensors=tensors, facts=dict(about["facts"]))


def load(path: str | Path, model: nn.Module, *, any_base: bool = False) -> Baseline:
    """Put the method of a folder on a model, with its values."""
    if is_baseline(path):
        return read(path).put_on(model, any_base=any_base)
    adapter = store.load(path)
    tuned = METHODS["lora"](model, None, 0, lora=adapter.config)
    assert tuned.board is not None
    tuned.board.remove("default")
    tuned.board.add("default", adapter, any_base=any_base)
    tuned.board.use("default")
    return tuned


def _record(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterFileError(Fault(str(path), f"cannot be read ({error})", "what deltaw writes")) from error
    shape = {"format": int, "method": str, "seed": int, "options": dict, "facts": dict}
    if not isinstance(about, dict) or any(type(about.get(key)) is not kind for key, kind in shape.items()):
        raise AdapterFileError(Fault(str(path), "is malformed", "what deltaw writes"))
    if about["format"] > FORMAT:
        raise AdapterFileError(Fault(str(path), f"is of format {about['format']}", f"at most {FORMAT}",
                                     "Update deltaw"))
    return about
