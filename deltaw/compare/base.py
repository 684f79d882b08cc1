"""What a study learns from its base in shapes alone, before a weight is read.

    unsuited_arms      which arms have nothing to apply to
    ranks_in_budget    which ranks fit a number of values
    values_of_body     how many values are not a classifier's head's
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from deltaw import baselines
from deltaw.bases import Base
from deltaw.bases.heads import head_modules
from deltaw.compare.arms import Arm, target_names, train_config, under
from deltaw.compare.config import SweepConfig
from deltaw.core import LoraConfig
from deltaw.errors import ConfigError, Fault, TargetError
from deltaw.inject import find_sites, resolve
from deltaw.train.config import TrainConfig

ALL = "all-linear"


def unsuited_arms(train: TrainConfig, arms: Sequence[Arm], base: Base) -> dict[str, str]:
    """Why an arm's method has nothing to apply to on this base, by the arm's label.

    Raises ConfigError, with the arms' names, for what is wrong with an arm itself, such as targets that match nothing.
    """
    found: dict[str, str] = {}
    faults: list[Fault | str] = []
    for arm in arms:
        config = train_config(train, arm)
        try:
            _try_on(base.model, config)
        except TargetError as error:
            found[arm.label] = " ".join(str(error).split())
        except ConfigError as error:
            faults += under(arm, error.faults)
    if faults:
        raise ConfigError(*faults)
    return found


def _try_on(model: Any, config: TrainConfig) -> None:
    """Put the method on the model and take it off again; a LoRA is only looked up.

    TargetError where the model lacks what the method needs; targets that match nothing are a fault of their name.
    """
    lora = None
    if baselines.trains_lora(config.method):
        try:
            resolve(config.lora, model, find_sites(model))
        except TargetError as error:
            if config.lora.target_modules == ALL:
                raise
            raise ConfigError(*error.faults) from error
        lora = replace(config.lora, init_lora_weights=True)  # shapes have no weights to begin with
    if config.method != "lora":
        baselines.METHODS[config.method](model, config.baseline, config.seed, lora=lora).remove()


def ranks_in_budget(config: SweepConfig, base: Base) -> dict[str | None, int]:
    """For each target set the largest rank with which it has no more values than the budget."""
    assert config.budget is not None
    ranks: dict[str | None, int] = {}
    faults: list[Fault | str] = []
    for targets in config.targets or (None,):
        lora = config.train.lora
        if targets is not None:
            lora = replace(lora, target_modules=target_names(targets))
        try:
            each = values_per_rank(base.model, lora)
        except ConfigError as error:
            faults += error.faults
            continue
        ranks[targets] = config.budget // each
        if ranks[targets] < 1:
            faults.append(Fault("SweepConfig.budget", f"got {config.budget:,}, and '{targets or 'the run'}' has "
                                f"{each:,} values at rank 1", "a budget for at least rank 1"))
    if faults:
        raise ConfigError(*faults)
    return ranks


def values_per_rank(model: Any, lora: LoraConfig) -> int:
    """Trained values of a low-rank change at rank 1."""
    return sum(target.parameters for target in resolve(replace(lora, r=1), model, find_sites(model)))


def values_of_body(base: Base, task: str) -> int | None:
    """Values of a classifier without its head, which is new for the task and which papers do not count; else None."""
    if task != "seq-cls":
        return None
    model: Any = base.model
    head = tuple(f"{name}." for name in head_modules(model))
    return sum(int(p.numel()) for name, p in model.named_parameters() if not name.startswith(head))
