"""A study: many runs of `deltaw.train` that are compared; none is done twice.

    folder/runs/ARM/SIZE/seed-N/run.json        what to do            outcome.json   what came of it
                               /adapter/        the trained tensors   log.txt        what it said
    folder/runs/together.txt                    what runs said that trained together

LoRA runs over one base train together in one process (`together`). Every other run is a process of its own: its peak
memory is not that of an earlier one. A run that fails, or that the system kills, is a row that says so; those of a
process that is killed with several in it are tried again one by one.
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
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from deltaw.store.atomic import replace_text
from deltaw.train.config import TrainConfig
from deltaw.train.job_checks import SHARED as SHARED_BY_JOBS

RUNS, SPEC, OUTCOME, LOG, TUNED = "runs", "run.json", "outcome.json", "log.txt", "adapter"
SET_LOG = "together.txt"
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


def run_study(folder: Path, runs: Sequence[Run], tell: Tell, *, together: bool = False) -> list[Outcome]:
    """The outcomes of all runs, in their order; those that are done already are read."""
    outcomes: list[Outcome] = []
    not_applicable: dict[str, Outcome] = {}
    before = {run: outcome for run, outcome in ((run.place, read_outcome(folder, run)) for run in runs)
              if outcome is not None and outcome.status != "failed"}
    shared = _all_sets(folder, [run for run in runs if run.place not in before], tell) if together else {}
    for number, run in enumerate(runs, 1):
        name = f"[{number}/{len(runs)}] {told(run)}"
        if run.place in before:
            outcome = before[run.place]
            tell(f"{name}: done before")
        elif run.place in shared:
            outcome = shared[run.place]
            tell(f"{name}: {describe(outcome)}")
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


def sets_of(runs: Sequence[Run]) -> list[list[Run]]:
    """Those of the runs that can train over one base in one process, in sets of two or more.

    A run is left out where it would not be computed as alone: another method than LoRA, layers that have to be
    compiled. Classifiers are too, since their heads keep them from sharing passes.
    """
    sets: dict[str, list[Run]] = {}
    for run in runs:
        train = run.train
        if (train.get("method"), train.get("task")) == ("lora", "causal-lm") and train.get("compile") != "on":
            shared = json.dumps([train.get(name) for name in SHARED_BY_JOBS])
            sets.setdefault(shared, []).append(run)
    return [members for members in sets.values() if len(members) > 1]


def _all_sets(folder: Path, runs: Sequence[Run], tell: Tell) -> dict[Path, Outcome]:
    """The outcomes of the runs that go together; none of one whose process was killed before it had any."""
    found: dict[Path, Outcome] = {}
    for members in sets_of(runs):
        tell(f"{len(members)} runs together: {'; '.join(map(told, members))} (see {folder / RUNS / SET_LOG}) ...")
        code = execute_together(folder, members)
        outcomes = {run.place: outcome for run in members if (outcome := read_outcome(folder, run)) is not None}
        if len(outcomes) < len(members):
            tell(f"the process with {len(members)} runs ended with {code}; those that it left run one by one")
        found |= outcomes
    return found


def execute_together(folder: Path, runs: Sequence[Run]) -> int:
    """Do several runs in one process; each goes on from its own last checkpoint. Returns the process's exit code."""
    for run in runs:
        (_prepared(folder, run) / OUTCOME).unlink(missing_ok=True)
    return _process(folder / RUNS / SET_LOG, [folder / run.place for run in runs])


def execute(folder: Path, run: Run) -> Outcome:
    """Do one run in a process of its own; a run that was broken off goes on from its last checkpoint."""
    place = _prepared(folder, run)
    code = _process(place / LOG, [place])
    outcome = read_outcome(folder, run)
    if outcome is None:
        killed = f"ended by signal {-code}; not enough memory?" if code < 0 else f"ended with {code}"
        outcome = Outcome(identity=run.identity, status="failed", reason=f"the process {killed}; see {place / LOG}")
        write_outcome(place, outcome)
    return outcome


def _prepared(folder: Path, run: Run) -> Path:
    """The run's folder, with what to do; what another run left there is gone."""
    place = folder / run.place
    spec = place / SPEC
    if recorded_identity(place, run) is None:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        replace_text(spec, json.dumps(asdict(run) | {"identity": run.identity}, indent=2, sort_keys=True))
    return place


def recorded_identity(place: Path, run: Run) -> str | None:
    """The identity under which this very run stands in its folder; None where another run or none does.

    It may be older than some options of a run, which then have to be what they are by default.
    """
    try:
        recorded = json.loads((place / SPEC).read_text(encoding="utf-8"))
        then, identity = recorded["train"].keys(), str(recorded["identity"])
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    usual = {field.name: field.default for field in fields(TrainConfig)}
    if any(name not in usual or usual[name] != run.train[name] for name in run.train.keys() - then):
        return None
    older = replace(run, train={name: value for name, value in run.train.items() if name in then})
    return identity if older.identity == identity else None


def _process(log: Path, places: Sequence[Path]) -> int:
    """Run the worker on these folders; KeyboardInterrupt where it was stopped by hand."""
    with log.open("a", encoding="utf-8") as file:
        code = subprocess.run([sys.executable, "-m", "deltaw.compare.worker", *map(str, places)], stdout=file,
                              stderr=file, stdin=subprocess.DEVNULL, env=own_code(), check=False).returncode
    if code == 130 or code == -2:
        raise KeyboardInterrupt
    return code


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


def adapters_of(folder: Path, runs: Sequence[Run]) -> Iterator[tuple[Run, Path]]:
    """The folders of trained tensors that are there."""
    for run in runs:
        tuned = folder / run.place / TUNED
        if tuned.is_dir():
            yield run, tuned
