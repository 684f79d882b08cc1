"""A run of a study and what came of it, as values and as files.

    run.json       what to do: the `Run`, and its identity
    outcome.json   what came of it: the `Outcome`, with the identity of the run it is of

A run has two digests. `training` is of all that decides the trained tensors, `identity` of how they are judged as well.
Where only the judging differs, what was trained stays and is judged again.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from deltaw.store.atomic import replace_text
from deltaw.train.config import TrainConfig

RUNS, SPEC, OUTCOME, LOG, TUNED = "runs", "run.json", "outcome.json", "log.txt", "adapter"
TOGETHER = "together.json"
"""Of a run that trained with others: with how many, itself among them."""
JUDGES = ("metrics", "max_new_tokens")
"""Options of a run that only say what is measured, as long as no metric chooses the best step."""
Status = Literal["done", "failed", "n/a"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run of a study, and what is measured of it."""

    arm: str
    """The arm's label: a method, or a point of a sweep."""
    seed: int
    """Seed of the run."""
    size: int | None = None
    """Training examples that it may see; None for all."""
    train: Mapping[str, Any]
    """Options of the run, as `TrainConfig.from_dict` takes them, without `out`."""
    test: str | None = None
    """Data to judge on; None judges on the run's own held-out rows."""
    test_rows: int | None = None
    """Rows of it, the first ones; None for all."""
    beams: Mapping[str, Any] = field(default_factory=dict)
    """Options of `Beams`, with which its answers are searched for."""
    latency: bool = False
    """Whether the time of a forward pass is measured too."""

    @property
    def place(self) -> Path:
        """The run's folder below the study's."""
        return Path(RUNS) / slug(self.arm) / ("all" if self.size is None else str(self.size)) / f"seed-{self.seed}"

    @property
    def identity(self) -> str:
        """A digest of everything that decides the outcome."""
        return _digest(asdict(self))

    @property
    def training(self) -> str:
        """A digest of what decides the trained tensors; how they are judged is no part of it."""
        learned = {name: value for name, value in self.train.items() if name not in JUDGES}
        if (best := self.train.get("keep_best", "loss")) not in (None, "loss"):
            learned |= {"metrics": [best], "max_new_tokens": self.train.get("max_new_tokens")}
        return _digest({"arm": self.arm, "seed": self.seed, "size": self.size, "train": learned})


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a run."""

    identity: str
    """The run's, so that an outcome of other options is not taken for it."""
    status: Status
    """done; failed; or n/a, where the method does not apply to this model."""
    reason: str = ""
    """Why it failed or does not apply."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Held-out figures, the loss among them."""
    rows: int = 0
    """Rows that the figures are of."""
    parameters: int = 0
    """Trained values."""
    base_parameters: int = 0
    """Values of the base."""
    bytes: int = 0
    """Size of the saved tensors' files."""
    peak_memory: int = 0
    """The most bytes that its process held in training."""
    step_seconds: float = 0.0
    """Median time of a training step; of passes shared with other runs, its share by tokens."""
    together: int = 1
    """Runs that trained in its process."""
    steps: int = 0
    """Training steps done."""
    curve: tuple[tuple[int, float], ...] = ()
    """Held-out loss by step."""
    latency: Mapping[str, float] = field(default_factory=dict)
    """Seconds of a forward pass: base_1, tuned_1, merged_1 and the same with 16 rows."""


def prepared(folder: Path, run: Run) -> Path:
    """The run's folder, with what to do. What another training left there is gone; of this one it stays."""
    place = folder / run.place
    if not trained_alike(place, run):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
    if recorded_identity(place, run) is None:
        replace_text(place / SPEC, json.dumps(asdict(run) | {"identity": run.identity}, indent=2, sort_keys=True))
    return place


def recorded_run(place: Path) -> tuple[Run, str] | None:
    """The run that a folder is for, and its identity as it was written down; None where there is none."""
    try:
        values = json.loads((place / SPEC).read_text(encoding="utf-8"))
        run = Run(**{name: values[name] for name in (f.name for f in fields(Run)) if name in values})
        return (run, str(values["identity"])) if isinstance(run.train, dict) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def recorded_identity(place: Path, run: Run) -> str | None:
    """The identity under which this very run stands in its folder; None where another run or none does.

    It may be older than some options of a run, which then have to be what they are by default.
    """
    then = recorded_run(place)
    older = None if then is None else _as_of(then[0], run)
    return then[1] if then is not None and older is not None and older.identity == then[1] else None


def trained_alike(place: Path, run: Run) -> bool:
    """Whether the folder is that of a run with the same training, however it was judged."""
    then = recorded_run(place)
    older = None if then is None else _as_of(then[0], run)
    return then is not None and older is not None and older.training == then[0].training


def _as_of(then: Run, run: Run) -> Run | None:
    """The run in the options that there were then; None where one that came later is not what it is by default."""
    usual = {field.name: field.default for field in fields(TrainConfig)}
    if any(name not in usual or usual[name] != run.train[name] for name in run.train.keys() - then.train.keys()):
        return None
    return replace(run, train={name: value for name, value in run.train.items() if name in then.train})


def read_outcome(folder: Path, run: Run) -> Outcome | None:
    """The outcome of this very run, if it is there."""
    try:
        values = json.loads((folder / run.place / OUTCOME).read_text(encoding="utf-8"))
        values["curve"] = tuple((int(step), float(loss)) for step, loss in values["curve"])
        outcome = Outcome(**values)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return outcome if outcome.identity in (run.identity, recorded_identity(folder / run.place, run)) else None


def write_outcome(place: Path, outcome: Outcome) -> None:
    """Write it whole or not at all."""
    replace_text(place / OUTCOME, json.dumps(asdict(outcome), indent=2))


def told(run: Run) -> str:
    """What a run is called."""
    return run.arm + (f", {run.size:,} examples" if run.size else "") + f", seed {run.seed}"


def describe(outcome: Outcome) -> str:
    """One line."""
    if outcome.status != "done":
        return f"{outcome.status}: {outcome.reason}"
    return ", ".join(f"{name} {value:.4g}" for name, value in outcome.figures.items())


def slug(label: str) -> str:
    """A label as a folder's name; different labels stay different."""
    plain = re.sub(r"[^A-Za-z0-9.+=_-]+", "-", label).strip("-.")
    return plain if plain == label else f"{plain}-{hashlib.sha256(label.encode()).hexdigest()[:6]}"


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
