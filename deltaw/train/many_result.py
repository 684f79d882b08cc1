"""`ManyResult`: how a set of jobs ended; plain values that a summary, a sweep or `--json` shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deltaw.train.job import JobResult


@dataclass(frozen=True, kw_only=True)
class ManyResult:
    """How a set ended. A run, a sweep or a comparison reads its jobs' results by name."""

    jobs: Mapping[str, JobResult]
    """Every job that was ever in the set."""
    rounds: int
    """Joint steps."""
    seconds: float
    """Time of the whole set, or of the part since it was resumed."""
    tokens: int
    """Tokens read in training by all jobs."""
    lines: tuple[str, ...] = ()
    """How it was computed, for people."""

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the jobs that failed."""
        return tuple(name for name, job in self.jobs.items() if job.status == "failed")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dict(vars(self)) | {"jobs": {name: job.to_dict() for name, job in self.jobs.items()},
                                   "lines": list(self.lines), "failed": list(self.failed)}
