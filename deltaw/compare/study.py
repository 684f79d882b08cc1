"""A study: many runs of `deltaw.train` that are compared. Each is a process of its own; none is done twice.

    folder/runs/ARM/SIZE/seed-N/run.json        what to do            outcome.json   what came of it
                               /adapter/        the trained tensors   log.txt        what it said

A process for each run keeps them apart: the peak memory of one is not that of an earlier one, and one that fails, or
that the system kills, is a row that says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from deltaw.store.atomic import replace_text

RUNS, SPEC, OUTCOME, LOG, TUNED = "runs", "run.json", "outcome.json", "log.txt", "adapter"
Status = Literal["done", "failed", "n/a"]
Tell = Callable[[str], None]


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
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


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
    """The most bytes held in training."""
    step_seconds: float = 0.0
    """Median time of a training step."""
    steps: int = 0
    """Training steps done."""
    curve: tuple[tuple[int, float], ...] = ()
    """Held-out loss by step."""
    latency: Mapping[str, float] = field(default_factory=dict)
    """Seconds of a forward pass: base_1, tuned_1, merged_1 and the same with 16 rows."""


def run_study(folder: Path, runs: Sequence[Run], tell: Tell) -> list[Outcome]:
    """The outcomes of all runs, in their order; those that are done already are read."""
    outcomes: list[Outcome] = []
    not_applicable: dict[str, Outcome] = {}
    for number, run in enumerate(runs, 1):
        name = f"[{number}/{len(runs)}] {run.arm}" + (f", {run.size:,} examples" if run.size else "")
        name += f", seed {run.seed}"
        outcome = read_outcome(folder, run)
        if outcome is not None and outcome.status != "failed":
            tell(f"{name}: done before")
        elif run.arm in not_applicable:  # it will not apply with another seed either
            outcome = Outcome(identity=run.identity, status="n/a", reason=not_applicable[run.arm].reason)
        else:
            tell(f"{name} ...")
            outcome = execute(folder, run)
            tell(f"{name}: {describe(outcome)}")
        if outcome.status == "n/a":
            not_applicable[run.arm] = outcome
        outcomes.append(outcome)
    return outcomes


def execute(folder: Path, run: Run) -> Outcome:
    """Do one run in a process of its own; a run that was broken off goes on from its last checkpoint."""
    place = folder / run.place
    spec = place / SPEC
    wanted = json.dumps(asdict(run) | {"identity": run.identity}, indent=2, sort_keys=True)
    if not spec.is_file() or spec.read_text(encoding="utf-8") != wanted:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        replace_text(spec, wanted)
    with (place / LOG).open("a", encoding="utf-8") as log:
        code = subprocess.run([sys.executable, "-m", "deltaw.compare.worker", str(place)], stdout=log, stderr=log,
                              stdin=subprocess.DEVNULL, env=own_code(), check=False).returncode
    if code == 130 or code == -2:
        raise KeyboardInterrupt
    outcome = read_outcome(folder, run)
    if outcome is None:
        killed = f"ended by signal {-code}; not enough memory?" if code < 0 else f"ended with {code}"
        outcome = Outcome(identity=run.identity, status="failed", reason=f"the process {killed}; see {place / LOG}")
        write_outcome(place, outcome)
    return outcome


def own_code() -> dict[str, str]:
    """The environment for a process that imports the same deltaw as this one."""
    ours = str(Path(__file__).resolve().parents[2])
    before = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": ours if not before else os.pathsep.join([ours, before])}


def read_outcome(folder: Path, run: Run) -> Outcome | None:
    """The outcome of this very run, if it is there."""
    try:
        values = json.loads((folder / run.place / OUTCOME).read_text(encoding="utf-8"))
        values["curve"] = tuple((int(step), float(loss)) for step, loss in values["curve"])
        outcome = Outcome(**values)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return outcome if outcome.identity == run.identity else None


def write_outcome(place: Path, outcome: Outcome) -> None:
    """Write it whole or not at all."""
    replace_text(place / OUTCOME, json.dumps(asdict(outcome), indent=2))


def describe(outcome: Outcome) -> str:
    """One line."""
    if outcome.status != "done":
        return f"{outcome.status}: {outcome.reason}"
    return ", ".join(f"{name} {value:.4g}" for name, value in outcome.figures.items())


def slug(label: str) -> str:
    """A label as a folder's name; different labels stay different."""
    plain = re.sub(r"[^A-Za-z0-9.+=_-]+", "-", label).strip("-.")
    return plain if plain == label else f"{plain}-{hashlib.sha256(label.encode()).hexdigest()[:6]}"


def adapters_of(folder: Path, runs: Sequence[Run]) -> Iterator[tuple[Run, Path]]:
    """The folders of trained tensors that are there."""
    for run in runs:
        tuned = folder / run.place / TUNED
        if tuned.is_dir():
            yield run, tuned
