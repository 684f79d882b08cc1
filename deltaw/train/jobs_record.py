"""`jobs.json`: how every job of a set stands, replaced in one step each time the whole set is saved.

A set goes on from the checkpoints that its record names, all of one moment, and never from a newer one of a single job.
They are kept until the next record is on the disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaw.errors import ConfigError, Fault
from deltaw.train.checkpoint import Checkpoints
from deltaw.train.config import TrainConfig
from deltaw.train.job import Job, JobResult, Status
from deltaw.train.prepare import Choices
from deltaw.train.result import TrainResult
from deltaw.train.run import RESULT_FILE

if TYPE_CHECKING:
    from deltaw.train.many import TrainMany

FILE = "jobs.json"
_OVER = ("finished", "cancelled")


class Record:
    """The record of one set, and of the session before, where the set is resumed."""

    def __init__(self, folder: Path, *, resume: bool) -> None:
        """Raises ConfigError where the folder holds a set that was not finished and is not to be resumed."""
        self.folder = folder
        self.path = folder / FILE
        self.before = self._read()
        unfinished = [n for n, job in self._jobs().items() if job["status"] in ("running", "paused")]
        if unfinished and not resume:
            raise ConfigError(Fault("ManyConfig.out", f"'{folder}' holds a set that was not finished "
                                    f"({', '.join(unfinished[:4])})", "a new folder",
                                    f"Go on with it with resume, or delete {self.path}"))
        if not resume:
            self.before = {}

    @property
    def rounds(self) -> int:
        """Rounds done when the set was saved."""
        return int(self.before.get("rounds", 0))

    @property
    def served(self) -> Mapping[str, float]:
        """The scheduler's account."""
        found: Mapping[str, float] = self.before.get("served", {})
        return found

    @property
    def choices(self) -> Choices | None:
        """How steps were computed."""
        found = self.before.get("choices")
        return None if found is None else Choices(**found)

    def jobs_beside(self, names: Sequence[str]) -> list[Job]:
        """Jobs that were added while the set ran."""
        return [Job(config=TrainConfig.from_dict(job["config"]), priority=job["priority"])
                for name, job in self._jobs().items() if name not in names]

    def is_over(self, name: str) -> bool:
        """Whether a job needs no more steps; one that failed is tried again."""
        return self._jobs().get(name, {}).get("status") in _OVER

    def status(self, name: str) -> Status:
        """What an attached job begins as."""
        return "paused" if self._jobs().get(name, {}).get("status") == "paused" else "running"

    def checkpoint(self, job: Job, checkpoints: Checkpoints) -> Path | None:
        """From where a job goes on: the record's checkpoint, its newest where it resumes alone, else the start."""
        named: str | None = self._jobs().get(job.name, {}).get("checkpoint")
        if named is not None:
            return checkpoints.folder / named
        return checkpoints.latest() if job.config.resume else None

    def result(self, job: Job) -> JobResult:
        """The result of a job that was over."""
        known = self._jobs()[job.name]
        file = Path(job.config.out).expanduser() / RESULT_FILE
        found = TrainResult.from_dict(json.loads(file.read_text(encoding="utf-8"))) \
            if known["status"] == "finished" and file.is_file() else None
        return JobResult(name=job.name, status=known["status"], steps=known["steps"],
                         planned_steps=known["planned_steps"], error=known["error"], result=found)

    def write(self, many: TrainMany) -> None:
        """Replace the record; the checkpoints that it names must be on the disk."""
        jobs: dict[str, Any] = {}
        kept = {job.name: job for job in many.given}
        for name, ended in many.ended.items():
            jobs[name] = {"status": ended.status, "checkpoint": ended.checkpoint and Path(ended.checkpoint).name,
                          "steps": ended.steps, "planned_steps": ended.planned_steps, "error": ended.error}
        pins = {}
        for name, job in many.jobs.items():
            pins[name] = job.session.checkpoints.folder / f"step-{job.steps:08d}"
            jobs[name] = {"status": job.status, "checkpoint": pins[name].name, "steps": job.steps,
                          "planned_steps": job.session.pace.steps, "error": ""}
        jobs = {name: jobs[name] | {"config": job.config.to_dict(), "priority": job.priority}
                for name, job in kept.items() if name in jobs}
        content = {"rounds": many.rounds, "served": dict(many.scheduler.served), "jobs": jobs,
                   "choices": many.choices.to_dict() if hasattr(many, "choices") else None}
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(f".{FILE}.unfinished")
        with unfinished.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(self.path)
        for name, job in many.jobs.items():
            job.session.checkpoints.pinned = pins[name]

    def _jobs(self) -> dict[str, Any]:
        found: dict[str, Any] = self.before.get("jobs", {})
        return found

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise ConfigError(Fault("ManyConfig.out", f"'{self.path}' cannot be read ({error})", "a record of a set",
                                    "Delete it to begin anew, or go on with each job alone")) from error
        return found if isinstance(found, dict) else {}
