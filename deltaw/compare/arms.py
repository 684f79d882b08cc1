"""The arms of a study: a label and the options of the run that differ."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from deltaw.baselines.config import OPTIONS, trains_lora
from deltaw.compare.config import CompareConfig, StudyConfig, SweepConfig, scaled
from deltaw.compare.run import Run
from deltaw.errors import ConfigError, Fault
from deltaw.train.config import TrainConfig
from deltaw.train.metrics import CHOICE_METRICS, TEXT_METRICS

RATES: Mapping[str, float] = {
    "full": 5e-5, "ft-top-k": 5e-5, "bitfit": 1.6e-3, "preembed": 5e-3, "prelayer": 1e-3,
    "adapter-h": 3e-4, "adapter-l": 3e-4, "adapter-p": 3e-4, "adapter-d": 3e-4, "lora": 5e-4, "lora+pe": 5e-4,
    "lora+pl": 5e-4, "head": 1e-3, "subspace": 1e-2,
}
"""Peak rates: the LoRA paper's (Tables 9 to 12) where the model is of their size; where it trains few values on a far
smaller model (prompts, prefixes, subspaces) the usual larger ones. `arms` overrides them."""


_OF_LORA: Mapping[str, Any] = {"freeze_a": False, "loraplus_lr_ratio": 1.0}
"""Options of a run that say how a LoRA is trained, and what they are for other methods."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One arm."""

    label: str
    options: Mapping[str, Any]
    """Options of `TrainConfig` that differ; those of the adapter under "lora"."""
    rank: int | None = None
    """In a sweep: the rank, by which arms that are equal otherwise stand side by side."""
    rest: str = ""
    """In a sweep: the rest of the point: targets, scale and rate."""


def arms_of_comparison(config: CompareConfig) -> list[Arm]:
    """The methods, then the arms that were spelled out."""
    named = [Arm(method, {"method": method, "learning_rate": RATES[method] * config.rate_factor})
             for method in config.methods if method not in config.arms]
    spelled = [Arm(label, dict(options)) for label, options in config.arms.items()]
    return [_with_own_options(arm, config) for arm in named + spelled]


def _with_own_options(arm: Arm, config: CompareConfig) -> Arm:
    """The arm with those of the shared options of other methods that are its method's."""
    method = str(arm.options.get("method", config.train.method))
    shared = config.baseline.to_dict()
    own = {name: shared[name] for name in OPTIONS.get(method, ())}
    return Arm(arm.label, {**arm.options, "baseline": {**own, **arm.options.get("baseline", {})}})


def arms_of_sweep(config: SweepConfig, budgeted: Mapping[str | None, int] | None = None) -> list[Arm]:
    """Every point of the grid; with a budget, each target set at the rank that `budgeted` has for it."""
    arms: list[Arm] = []
    for targets in config.targets or (None,):
        ranks = config.ranks if budgeted is None else (budgeted[targets],)
        for rank, rule, rate in product(ranks, config.scales or (None,), config.rates or (None,)):
            lora: dict[str, Any] = {"r": rank} | ({"target_modules": target_names(targets)} if targets else {})
            lora |= scaled(replace(config.train.lora, r=rank), rule)
            rates = {} if rate is None else {"learning_rate": rate}
            rest = _label(targets, None, rule, rate)
            arms.append(Arm(_label(targets, rank, rule, rate), {**rates, "lora": lora}, rank, rest))
    return arms


def runs_of(config: CompareConfig | SweepConfig, arms: list[Arm], *, steps: int | None = None) -> list[Run]:
    """Each arm with each size and each seed."""
    sizes = config.sizes if isinstance(config, CompareConfig) else ()
    latency = isinstance(config, CompareConfig) and config.latency
    return [Run(arm=arm.label, seed=seed, size=size or None, train=merged(config.train, arm, seed, steps),
                test=config.test, test_rows=config.test_rows, beams=asdict(config.beams), latency=latency)
            for arm in arms for size in sizes or (0,) for seed in config.seeds]


def merged(train: TrainConfig, arm: Arm, seed: int, steps: int | None) -> dict[str, Any]:
    """The options of a run: those that all share, the arm's, the seed."""
    shared = train.to_dict()
    method = str(arm.options.get("method", train.method))
    shared |= {name: usual for name, usual in _OF_LORA.items() if not trains_lora(method)}
    lora = {**(shared["lora"] if trains_lora(method) else {}), **arm.options.get("lora", {})}
    options = {**shared, **arm.options, "lora": lora, "seed": seed, "resume": False}
    if steps is not None:
        options["max_steps"] = steps
    for name in ("out", "threads"):
        del options[name]
    return options


def faults_of_arms(config: StudyConfig) -> list[Fault | str]:
    """What is wrong with the options of each arm, under its name: all that is known without the base and the data."""
    if isinstance(config, SweepConfig):
        arms = arms_of_sweep(config, None if config.budget is None else dict.fromkeys(config.targets or (None,), 1))
    else:
        assert isinstance(config, CompareConfig)
        arms = arms_of_comparison(config)
    faults: list[Fault | str] = list(_misfits(config.train))
    for arm in arms:
        try:
            made = train_config(config.train, arm)
        except ConfigError as error:
            faults += under(arm, error.faults)
            continue
        if (made.task, made.metrics) != (config.train.task, config.train.metrics):
            faults += under(arm, _misfits(made))
    return faults


def train_config(train: TrainConfig, arm: Arm) -> TrainConfig:
    """The config of an arm's run of the first seed, as it would be in the study's own folder."""
    return TrainConfig.from_dict({**merged(train, arm, train.seed, None), "out": train.out})


def under(arm: Arm, faults: Iterable[Fault | str]) -> list[Fault | str]:
    """The faults with the arm's name before each."""
    named = f"arm '{arm.label}': "
    return [replace(fault, where=named + fault.where) if isinstance(fault, Fault) else named + fault
            for fault in faults]


def _misfits(train: TrainConfig) -> list[Fault]:
    """Metrics of written answers, where labels are chosen."""
    if train.task != "seq-cls":
        return []
    return [Fault("TrainConfig.metrics", f"{metric} is of written answers, and task seq-cls chooses labels",
                  "exact_match, " + ", ".join(CHOICE_METRICS)) for metric in train.metrics if metric in TEXT_METRICS]


def target_names(text: str) -> str | tuple[str, ...]:
    """The targets that "q_proj+v_proj" stands for."""
    return text if text == "all-linear" else tuple(text.split("+"))


def _label(targets: str | None, rank: int | None, rule: str | None, rate: float | None) -> str:
    def parts() -> Iterator[str]:
        if targets is not None:
            yield targets
        if rank is not None:
            yield f"r={rank}"
        if rule is not None:
            yield "rank-stabilised" if rule == "rs" else f"alpha={rule}"
        if rate is not None:
            yield f"rate={rate:g}"

    return " ".join(parts())
