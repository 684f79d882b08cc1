"""A study: many runs of `deltaw.train` that are compared; none is done twice.

    folder/runs/ARM/SIZE/seed-N/run.json        what to do            outcome.json   what came of it
                               /adapter/        the trained tensors   log.txt        what it said
    folder/runs/together.txt                    what runs said that trained together

LoRA runs over one base train together in one process (`together`). Every other run is a process of its own: its peak
memory is not that of an earlier one. A run that fails, or that the system kills, is a row that says so; those of a
process that is killed with several in it are tried again one by one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from deltaw.compare.run import (
    LOG,
    OUTCOME,
    RUNS,
    Outcome,
    Run,
    describe,
    prepared,
    read_outcome,
    told,
    write_outcome,
)
from deltaw.train.job_checks import SHARED as SHARED_BY_JOBS

SET_LOG = "together.txt"
Tell = Callable[[str], None]


def run_study(folder: Path, runs: Sequence[Run], tell: Tell, *, together: bool = False,
              unsuited: Mapping[str, str] | None = None) -> list[Outcome]:
    """The outcomes of all runs, in their order; those that are done already are read.

    `unsuited` holds arms that are known not to apply to the base, and why: they are written down and not begun. That an
    earlier study found so is not taken for granted: what it missed may be there now.
    """
    outcomes: list[Outcome] = []
    before = {run.place: outcome for run in runs
              if (outcome := read_outcome(folder, run)) is not None and outcome.status == "done"}
    not_applicable = dict(unsuited or {})
    left = [run for run in runs if run.place not in before]
    for run in left:
        if run.arm in not_applicable:
            write_outcome(prepared(folder, run), _unsuited(run, not_applicable[run.arm]))
    shared = _all_sets(folder, [run for run in left if run.arm not in not_applicable], tell) if together else {}
    for number, run in enumerate(runs, 1):
        name = f"[{number}/{len(runs)}] {told(run)}"
        if run.place in before:
            outcome = before[run.place]
            tell(f"{name}: done before")
        elif run.place in shared:
            outcome = shared[run.place]
            tell(f"{name}: {describe(outcome)}")
        elif run.arm in not_applicable:  # it will not apply with another seed either
            outcome = _unsuited(run, not_applicable[run.arm])
        else:
            tell(f"{name} ...")
            outcome = execute(folder, run)
            tell(f"{name}: {describe(outcome)}")
        if outcome.status == "n/a":
            not_applicable[run.arm] = outcome.reason
        outcomes.append(outcome)
    return outcomes


def _unsuited(run: Run, reason: str) -> Outcome:
    return Outcome(identity=run.identity, status="n/a", reason=reason)


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
        place = prepared(folder, run)
        if read_outcome(folder, run) is not None:  # one that failed, and is tried again
            (place / OUTCOME).unlink()
    return _process(folder / RUNS / SET_LOG, [folder / run.place for run in runs])


def execute(folder: Path, run: Run) -> Outcome:
    """Do one run in a process of its own; a run that was broken off goes on from its last checkpoint."""
    place = prepared(folder, run)
    code = _process(place / LOG, [place])
    outcome = read_outcome(folder, run)
    if outcome is None:
        killed = f"ended by signal {-code}; not enough memory?" if code < 0 else f"ended with {code}"
        outcome = Outcome(identity=run.identity, status="failed", reason=f"the process {killed}; see {place / LOG}")
        write_outcome(place, outcome)
    return outcome


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
