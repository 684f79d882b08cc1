"""`CompareConfig` and `SweepConfig`: a study as a value. What every run shares is a `TrainConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from deltaw.baselines.config import OPTIONS, BaselineConfig
from deltaw.compare.figures import is_measurable
from deltaw.compare.published import SWEEPS, TABLES
from deltaw.core import LoraConfig
from deltaw.errors import ConfigError, Fault, near
from deltaw.train.beams import Beams
from deltaw.train.config import TrainConfig
from deltaw.train.figures import metric_name

Paper = Literal["e2e", "sst2", "wikisql"]
_OF_THE_STUDY = {"out": "no folder: each run has one below the study's", "seed": "none: name it in seeds",
                 "model": "none: all arms share one base"}
"""Options of a run that an arm cannot have, and what is expected instead."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """What every study has."""

    train: TrainConfig
    """The run that all arms share; its `out` is the study's folder."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; each arm is trained once with each."""
    test: str | None = None
    """Data to judge on; by default the held-out rows that also chose the best step, which flatters a little."""
    test_rows: int | None = None
    """Rows of it to judge on, the first ones; by default all."""
    beams: Beams = field(default_factory=Beams)
    """How answers to the test data are searched for."""
    judge: str | None = None
    """The figure that decides: loss or one of the metrics; by default the first metric, or loss."""
    together: Literal["auto", "off"] = "auto"
    """Train LoRA arms in one process over one base; off gives each a process, with a memory and a time of its own."""

    def __post_init__(self) -> None:
        beams: Any = self.beams
        if isinstance(beams, Mapping):
            object.__setattr__(self, "beams", Beams(**beams))
        faults: list[Fault | str] = list(self._faults())
        if not faults:  # arms are made of values that are right
            from deltaw.compare.arms import faults_of_arms  # here, since arms are made of configs

            faults = faults_of_arms(self)
        if faults:
            raise ConfigError(*faults)

    @property
    def judged_by(self) -> str:
        """The figure that decides."""
        return self.judge or next(iter(self._metrics()), "loss")

    def _metrics(self) -> list[str]:
        return [metric_name(metric) for metric in self.train.metrics]

    def _faults(self) -> list[Fault]:
        known, faults = ["loss", *self._metrics()], []
        if self.judge is not None and self.judge not in known:
            faults.append(self.fault("judge", "one of " + ", ".join(known), near(self.judge, known)
                                     or "Name it in metrics too"))
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or any(seed < 0 for seed in self.seeds):
            faults.append(self.fault("seeds", "different whole numbers >= 0"))
        if self.test_rows is not None and self.test_rows < 1:
            faults.append(self.fault("test_rows", "a whole number >= 1, or nothing"))
        if self.test is None:
            judging = {"test_rows": self.test_rows, **{f.name: getattr(self.beams, f.name) for f in fields(Beams)
                                                       if getattr(self.beams, f.name) != f.default}}
            faults += [Fault(f"{type(self).__name__}.{name}", f"got {value!r} without test data", "--test with it",
                             "Held-out rows are judged as in training") for name, value in judging.items()
                       if value is not None]
        if self.together not in ("auto", "off"):
            faults.append(self.fault("together", "auto or off"))
        if any(callable(metric) for metric in self.train.metrics):
            faults.append(Fault(f"{type(self).__name__}.train.metrics", "holds a function", "names of metrics",
                                "Each run is a process of its own, which a function cannot be given to"))
        return faults

    def fault(self, name: str, expected: str, remedy: str = "") -> Fault:
        """A fault of one of the fields."""
        return Fault(f"{type(self).__name__}.{name}", f"got {getattr(self, name)!r}", expected, remedy)


@dataclass(frozen=True, kw_only=True)
class CompareConfig(StudyConfig):
    """Methods side by side on one task."""

    methods: tuple[str, ...] = ("lora", "full", "bitfit")
    """Tuning methods, each with the rate that its paper used unless `arms` says otherwise."""
    rate_factor: float = 1.0
    """What the methods' own rates are multiplied with: small models and short runs take larger ones."""
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    """Options of the other methods; each takes those that are its own."""
    arms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Further arms: a label, and the options of the run that differ."""
    sizes: tuple[int, ...] = ()
    """Numbers of training examples to compare with, 0 for all (the paper's Table 16)."""
    paper: Paper | None = None
    """The task of the LoRA paper that this is, to show its rows beside: e2e, sst2 or wikisql."""
    latency: bool = True
    """Measure a forward pass too: base, with the change, merged; 1 and 16 rows."""
    intrinsic: bool = False
    """Search the intrinsic dimension too: the smallest random subspace with 90 % of full fine-tuning's figure."""
    dimensions: tuple[int, int] = (16, 65_536)
    """The bounds of that search."""

    def __post_init__(self) -> None:
        baseline: Any = self.baseline
        if isinstance(baseline, Mapping):
            object.__setattr__(self, "baseline", BaselineConfig.from_dict(baseline))
        super().__post_init__()

    def _faults(self) -> list[Fault]:
        faults = super()._faults()
        faults += [self.fault("methods", "of " + ", ".join(OPTIONS), near(method, OPTIONS))
                   for method in self.methods if method not in OPTIONS]
        if self.paper is not None and self.paper not in TABLES:
            faults.append(self.fault("paper", "one of " + ", ".join(TABLES), near(str(self.paper), TABLES)))
        if not 0 < self.rate_factor < float("inf"):
            faults.append(self.fault("rate_factor", "a number above 0"))
        if any(size < 0 for size in self.sizes):
            faults.append(self.fault("sizes", "numbers >= 0"))
        if self.intrinsic and not is_measurable(self.judged_by):
            faults.append(Fault("CompareConfig.intrinsic", f"is judged by {self.judged_by}", "a figure of which 90 % "
                                "means something, such as accuracy", "Name one in metrics, and judge"))
        if not (len(self.dimensions) == 2 and 1 < self.dimensions[0] < self.dimensions[1]):
            faults.append(self.fault("dimensions", "two numbers, 1 < lower < upper"))
        faults += [fault for label, options in self.arms.items() for fault in _arm_faults(label, options)]
        if not self.methods and not self.arms:
            faults.append(self.fault("methods", "at least one method, or arms"))
        return faults


def _arm_faults(label: str, options: Any) -> list[Fault]:
    """What is wrong with the names of an arm's options."""
    where = f"CompareConfig.arms['{label}']"
    if not isinstance(options, Mapping):
        return [Fault(where, f"got {options!r}", "options of TrainConfig that differ")]
    known = [f.name for f in fields(TrainConfig)]
    faults = [Fault(f"{where}.{key}", "is unknown", "an option of TrainConfig", near(key, known))
              for key in options if key not in known]
    faults += [Fault(f"{where}.{key}", f"got {options[key]!r}", why)
               for key, why in _OF_THE_STUDY.items() if key in options]
    return faults + [Fault(f"{where}.{key}", f"got {options[key]!r}", "a table of options")
                     for key in ("lora", "baseline") if not isinstance(options.get(key, {}), Mapping)]


@dataclass(frozen=True, kw_only=True)
class SweepConfig(StudyConfig):
    """Ranks, target sets, scales and rates, crossed."""

    ranks: tuple[int, ...] = (1, 2, 4, 8, 64)
    """Ranks r. With `budget` they are worked out instead."""
    targets: tuple[str, ...] = ()
    """Target sets: "all-linear", or names joined by "+", as q_proj+v_proj; by default the run's own."""
    scales: tuple[str, ...] = ()
    """Rules for alpha: a number, "r", "2r", or "rs" for rank-stabilised scaling; by default the run's own alpha."""
    rates: tuple[float, ...] = ()
    """Learning rates; by default the run's own."""
    budget: int | None = None
    """Trained values that each target set may have: its rank is the largest that fits (the paper's Table 5)."""
    halving: int = 0
    """Successive halving: of this many arms one goes on, to a run so many times as long; 0 trains all to the end."""
    rungs: int = 3
    """Rounds of halving, the last one at full length."""
    paper: Literal["wikisql", "mnli", "e2e"] | None = None
    """The task of the LoRA paper that this is, to show its Tables 5 and 6 (wikisql, mnli) or 18 (e2e)."""

    def _faults(self) -> list[Fault]:
        faults = super()._faults()
        if not self.ranks or any(rank < 1 for rank in self.ranks):
            faults.append(self.fault("ranks", "whole numbers >= 1"))
        if any(not rate > 0 for rate in self.rates):
            faults.append(self.fault("rates", "numbers above 0"))
        faults += [Fault("SweepConfig.scales", f"got '{rule}'", 'a number, "r", "2r" or "rs"')
                   for rule in self.scales if not is_rule(rule)]
        if self.budget is not None and self.budget < 1:
            faults.append(self.fault("budget", "a whole number >= 1, or nothing"))
        if self.halving != 0 and self.halving < 2:
            faults.append(self.fault("halving", "0, or a whole number >= 2"))
        if self.paper is not None and self.paper not in SWEEPS:
            faults.append(self.fault("paper", "one of " + ", ".join(SWEEPS), near(str(self.paper), SWEEPS)))
        if self.rungs < 2:
            faults.append(self.fault("rungs", "a whole number >= 2"))
        return faults


def is_rule(rule: str) -> bool:
    """Whether a text is a rule for alpha."""
    if rule in ("r", "rs") or (rule.endswith("r") and rule[:-1].isdigit()):
        return True
    try:
        return float(rule) > 0
    except ValueError:
        return False


def scaled(lora: LoraConfig, rule: str | None) -> dict[str, Any]:
    """`lora_alpha` and `use_rslora` of a config with its rank, by a rule; nothing where there is none."""
    if rule is None:
        return {}
    if rule == "rs":
        return {"use_rslora": True}
    if rule.endswith("r"):
        return {"lora_alpha": int(rule[:-1] or 1) * lora.r}
    return {"lora_alpha": float(rule)}
