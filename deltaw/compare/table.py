"""From outcomes to rows: one for each arm and size, figures as mean and spread over seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from deltaw.compare.figures import LOWER_IS_BETTER
from deltaw.compare.noise import Measured, measured
from deltaw.compare.run import Outcome, Run


@dataclass(frozen=True, kw_only=True)
class Row:
    """One arm of a study."""

    arm: str
    size: int | None = None
    """Training examples; None for all."""
    figures: Mapping[str, Measured] = field(default_factory=dict)
    """Held-out figures over the seeds that were finished."""
    parameters: int = 0
    """Trained values, without those of a classifier's new head."""
    head: int = 0
    """Values of that head, which are trained too."""
    share: float = 0.0
    """Trained values as a share of the base's, both without the head."""
    bytes: int = 0
    """Saved tensors."""
    peak_memory: int = 0
    """The most bytes that the process of a training run of it held."""
    step_seconds: float = 0.0
    """Time of a training step, median over seeds; of shared passes the share by tokens."""
    together: int = 1
    """The most runs that trained in a process with one of these; then memory and time are not this arm's alone."""
    latency: Mapping[str, float] = field(default_factory=dict)
    """Seconds of a forward pass, median over seeds."""
    seeds: tuple[int, ...] = ()
    """Seeds that were finished."""
    failed: Mapping[int, str] = field(default_factory=dict)
    """Seeds that were not, and why."""
    not_applicable: str = ""
    """Why the method cannot be used on this model."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Row:
        """The row that `to_dict` gave, or an older version's, which may lack some fields."""
        known = {field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values}
        figures = {name: Measured(**value) for name, value in known.get("figures", {}).items()}
        failed = {int(seed): why for seed, why in known.get("failed", {}).items()}
        return cls(**known | {"figures": figures, "failed": failed, "seeds": tuple(known.get("seeds", ()))})


def rows_of(runs: Sequence[Run], outcomes: Sequence[Outcome], body: int | None = None) -> list[Row]:
    """A row for each arm and size, in the order in which they appear.

    `body` is how many values the base has without a head that is new for the task, where it has one.
    """
    groups: dict[tuple[str, int | None], list[tuple[Run, Outcome]]] = {}
    for run, outcome in zip(runs, outcomes, strict=True):
        groups.setdefault((run.arm, run.size), []).append((run, outcome))
    return [_row(arm, size, group, body) for (arm, size), group in groups.items()]


def _row(arm: str, size: int | None, group: Sequence[tuple[Run, Outcome]], body: int | None) -> Row:
    done = [(run, outcome) for run, outcome in group if outcome.status == "done"]
    missing = next((outcome.reason for _, outcome in group if outcome.status == "n/a"), "")
    failed = {run.seed: outcome.reason for run, outcome in group if outcome.status == "failed"}
    if not done:
        return Row(arm=arm, size=size, failed=failed, not_applicable=missing)
    outcomes = [outcome for _, outcome in done]
    first = outcomes[0]
    whole = first.base_parameters if body is None else body
    head = first.base_parameters - whole if done[0][0].train.get("method") != "subspace" else 0  # its d values are all
    parameters = first.parameters - head
    return Row(
        arm=arm, size=size, failed=failed, not_applicable=missing, seeds=tuple(run.seed for run, _ in done),
        figures={name: measured([o.figures[name] for o in outcomes if name in o.figures]) for name in first.figures},
        parameters=parameters, head=head, share=parameters / whole if whole else 0.0,
        bytes=first.bytes, peak_memory=max(o.peak_memory for o in outcomes),
        step_seconds=median(o.step_seconds for o in outcomes), together=max(o.together for o in outcomes),
        latency={name: median(o.latency[name] for o in outcomes if name in o.latency) for name in first.latency})


def best_first(rows: Sequence[Row], figure: str) -> list[Row]:
    """The rows that have the figure, the best mean first."""
    there = [row for row in rows if figure in row.figures]
    return sorted(there, key=lambda row: row.figures[figure].mean, reverse=figure not in LOWER_IS_BETTER)
