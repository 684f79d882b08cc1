"""The two studies: `compare` puts methods side by side, `sweep` ranks, targets, scales and rates."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaw.bases import Base
from deltaw.compare.advice import Advice, advise
from deltaw.compare.arms import Arm, arms_of_comparison, arms_of_sweep, runs_of
from deltaw.compare.base import ranks_in_budget, unsuited_arms, values_of_body
from deltaw.compare.config import CompareConfig, SweepConfig
from deltaw.compare.figures import better, reported
from deltaw.compare.inputs import check_inputs
from deltaw.compare.intrinsic import Intrinsic, intrinsic_dimension
from deltaw.compare.run import TUNED, Outcome, Run, read_outcome
from deltaw.compare.study import Tell, run_study
from deltaw.compare.table import Row, best_first, rows_of
from deltaw.errors import Fault, TrainingError
from deltaw.store.atomic import replace_text
from deltaw.train.config import TrainConfig
from deltaw.train.examples import open_base
from deltaw.train.run import CHECKPOINTS

RESULT, BEST = "study.json", "best"


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """A finished study. `deltaw.report` makes a page of it."""

    kind: str
    """compare or sweep."""
    folder: str
    """The study's folder."""
    config: dict[str, Any]
    """What was asked for."""
    judged_by: str
    """The figure that decides."""
    rows: tuple[Row, ...]
    """One for each arm and size."""
    curves: dict[str, list[tuple[int, float]]]
    """Held-out loss by step of each arm, of its first finished seed."""
    advice: Advice | None = None
    """Which arm to take."""
    best: str | None = None
    """The folder of the recommended arm's best adapter, in a sweep."""
    intrinsic: tuple[Intrinsic, ...] = ()
    """The intrinsic dimension, where it was asked for."""
    ranks: dict[str, tuple[str, int]] = dataclasses.field(default_factory=dict)
    """Of each arm of a sweep: what it shares with arms of other ranks, and its rank."""
    dropped: tuple[str, ...] = ()
    """Arms that halving left behind, in the order in which they fell."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @property
    def failures(self) -> int:
        """Runs that failed."""
        return sum(len(row.failed) for row in self.rows)


def compare(config: CompareConfig, tell: Tell | None = None) -> StudyResult:
    """Train every method with every seed and size, and return the table; what was done before is not done again.

    A method that cannot be used on this model is a row that says why; so is a seed whose run failed.
    """
    check_inputs(config)
    tell, base, arms = tell or say, open_base(config.train), arms_of_comparison(config)
    result = _study("compare", config, arms, base, unsuited_arms(config.train, arms, base), tell)
    if config.intrinsic:
        result = dataclasses.replace(result, intrinsic=tuple(intrinsic_dimension(config, tell)))
    return _written(result)


def sweep(config: SweepConfig, tell: Tell | None = None) -> StudyResult:
    """Train every point of the grid, or with halving the promising ones to the end; keep the recommended adapter."""
    check_inputs(config)
    tell, base = tell or say, open_base(config.train)
    arms = arms_of_sweep(config, None if config.budget is None else ranks_in_budget(config, base))
    unsuited = unsuited_arms(config.train, arms, base)
    dropped: list[str] = []
    if config.halving:
        arms, dropped = _halve(config, arms, tell)
    result = _study("sweep", config, arms, base, unsuited, tell, dropped)
    return _written(dataclasses.replace(result, best=_keep_best(config, arms, result)))


def so_far(config: CompareConfig) -> StudyResult:
    """What is known of a comparison that is under way: its finished runs; nothing is trained or judged."""
    folder, arms = Path(config.train.out).expanduser(), arms_of_comparison(config)
    finished = [(run, outcome) for run in runs_of(config, arms) if (outcome := read_outcome(folder, run)) is not None]
    return _written(_result("compare", config, arms, [run for run, _ in finished], [out for _, out in finished],
                            open_base(config.train)))


def say(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)


def _study(kind: str, config: CompareConfig | SweepConfig, arms: list[Arm], base: Base, unsuited: Mapping[str, str],
           tell: Tell, dropped: Sequence[str] = ()) -> StudyResult:
    folder = Path(config.train.out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    for label, why in unsuited.items():
        tell(f"{label} does not apply: {why}")
    runs = runs_of(config, arms)
    outcomes = run_study(folder, runs, tell, together=config.together == "auto", unsuited=unsuited)
    return _result(kind, config, arms, runs, outcomes, base, dropped)


def _result(kind: str, config: CompareConfig | SweepConfig, arms: Sequence[Arm], runs: Sequence[Run],
            outcomes: Sequence[Outcome], base: Base, dropped: Sequence[str] = ()) -> StudyResult:
    rows = rows_of(runs, outcomes, values_of_body(base, config.train.task))
    curves: dict[str, list[tuple[int, float]]] = {}
    for run, outcome in zip(runs, outcomes, strict=True):
        if outcome.curve and run.size is None:
            curves.setdefault(run.arm, list(outcome.curve))
    whole = [row for row in rows if row.size is None] or rows
    judge = reported(config.judged_by, rows)
    return StudyResult(kind=kind, folder=str(Path(config.train.out).expanduser()), config=plain(config),
                       judged_by=judge, rows=tuple(rows), curves=curves, advice=advise(whole, judge),
                       dropped=tuple(dropped),
                       ranks={arm.label: (arm.rest, arm.rank) for arm in arms if arm.rank is not None})


def _written(result: StudyResult) -> StudyResult:
    replace_text(Path(result.folder) / RESULT, json.dumps(result.to_dict(), indent=2))
    return result


def _halve(config: SweepConfig, arms: list[Arm], tell: Tell) -> tuple[list[Arm], list[str]]:
    """The arms that are worth a run of full length (successive halving, Jamieson and Talwalkar 2016).

    Each rung trains anew and not on: a rate's schedule belongs to the length of its run. That costs less than half as
    much again, since each rung is so many times shorter than the next.
    """
    full = _steps(config.train)
    dropped: list[str] = []
    for rung in range(config.rungs - 1):
        if len(arms) <= 1:
            break
        steps = max(2, full // config.halving ** (config.rungs - 1 - rung))
        keep = math.ceil(len(arms) / config.halving)
        tell(f"rung {rung + 1}: {len(arms)} arms for {steps} of {full} steps, {keep} go on")
        one = dataclasses.replace(config, seeds=config.seeds[:1], train=dataclasses.replace(
            config.train, out=str(Path(config.train.out) / f"rung-{rung + 1}")))
        runs = runs_of(one, arms, steps=steps)
        outcomes = run_study(Path(one.train.out).expanduser(), runs, tell, together=config.together == "auto")
        rows = rows_of(runs, outcomes)
        judge = reported(config.judged_by, rows)
        ordered = [row.arm for row in best_first(rows, judge)]
        if not ordered:
            raise TrainingError(Fault(f"rung {rung + 1} of halving", f"no arm has the figure {judge}", "one to go on "
                                      "with", _why_none(rows)))
        dropped += [arm.label for arm in arms if arm.label not in ordered[:keep]]
        arms = [arm for arm in arms if arm.label in ordered[:keep]]
    return arms, dropped


def _why_none(rows: Sequence[Row]) -> str:
    reason = next((why for row in rows for why in (*row.failed.values(), row.not_applicable) if why), "")
    return f"The first: {reason}" if reason else "Name another one with --judge"


def _steps(train: TrainConfig) -> int:
    """Optimizer steps of a run of full length."""
    if train.max_steps is not None:
        return train.max_steps
    from deltaw.train.examples import load_examples
    from deltaw.train.run import pace_of

    _, examples = load_examples(dataclasses.replace(train, device="cpu"))
    return pace_of(train, examples.batches_per_epoch).steps


def _keep_best(config: SweepConfig, arms: list[Arm], result: StudyResult) -> str | None:
    """Copy the adapter of the recommended arm's best seed to its own folder."""
    if result.advice is None:
        return None
    runs = [run for run in runs_of(config, arms) if run.arm == result.advice.arm]
    chosen: tuple[Run, float] | None = None
    for run, figure in _figures(Path(result.folder), runs, result.judged_by):
        if chosen is None or better(result.judged_by, figure, chosen[1]):
            chosen = (run, figure)
    if chosen is None:
        return None
    target = Path(result.folder) / BEST
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(Path(result.folder) / chosen[0].place / TUNED, target, ignore=shutil.ignore_patterns(CHECKPOINTS))
    return str(target)


def _figures(folder: Path, runs: Sequence[Run], figure: str) -> list[tuple[Run, float]]:
    found = [(run, read_outcome(folder, run)) for run in runs]
    return [(run, outcome.figures[figure]) for run, outcome in found if outcome and figure in outcome.figures]


def plain(config: CompareConfig | SweepConfig) -> dict[str, Any]:
    """A study's config as plain JSON values."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    own = {"baseline": config.baseline.to_dict()} if isinstance(config, CompareConfig) else {}
    return values | {"train": config.train.to_dict(), "beams": dataclasses.asdict(config.beams)} | own
