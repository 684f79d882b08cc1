"""What a set of jobs shows while it runs: a live table on stderr, a row for each job; lines without a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltaw.train.job import ActiveJob, JobResult

COLUMNS = ("job", "status", "step", "loss", "held-out", "tokens/s", "to go")
_EVERY = 0.5
"""Seconds between two drawings on a terminal."""
_LINES_EVERY = 30.0
"""Seconds between two tables of plain lines."""


class JobsTable:
    """A context manager; `show` draws when it is time to."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet, self._next = quiet, 0.0
        self._live: Any = None

    def __enter__(self) -> JobsTable:
        if not self.quiet:
            from rich.console import Console
            from rich.live import Live

            console = Console(stderr=True)
            self._live = Live(console=console, transient=True, auto_refresh=False) if console.is_terminal else None
            if self._live is not None:
                self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, jobs: Iterable[ActiveJob], ended: Iterable[JobResult]) -> None:
        """The jobs as they stand, at most twice a second."""
        now = time.monotonic()
        if self.quiet or now < self._next:
            return
        rows = [row_of(job) for job in jobs] + [ended_row(result) for result in ended]
        self._next = now + (_EVERY if self._live is not None else _LINES_EVERY)
        if self._live is not None:
            self._live.update(table_of(rows), refresh=True)
        else:
            for row in rows:
                print(line_of(row), file=sys.stderr, flush=True)


def row_of(job: ActiveJob) -> tuple[str, ...]:
    """One job at work: step, loss, held-out figures, its own speed, and the time to go at that speed."""
    state, steps = job.state, job.session.pace.steps
    speed = state.tokens / state.seconds if state.seconds else 0.0
    spent = time.perf_counter() - job.began
    done = state.step - job.begun_at
    to_go = f"{spent / done * (steps - state.step):,.0f} s" if done else ""
    held = "  ".join(f"{name} {value:.4g}" for name, value in job.figures.items())
    return (job.name, job.status, f"{state.step}/{steps}", "" if job.loss is None else f"{job.loss:.4f}", held,
            f"{speed:,.0f}" if speed else "", to_go)


def ended_row(result: JobResult) -> tuple[str, ...]:
    """One job that has ended: its last figures, or why it failed."""
    figures = {} if result.result is None else result.result.after
    held = "  ".join(f"{name} {value:.4g}" for name, value in figures.items()) or result.error.split("\n")[0]
    return result.name, result.status, f"{result.steps}/{result.planned_steps}", "", held, "", ""


def line_of(row: tuple[str, ...]) -> str:
    """A row as a line of its own, where no heading says what a figure is."""
    name, status, step, loss, held, speed, to_go = row
    said = (name, status, f"step {step}", loss and f"loss {loss}",
            held if status == "failed" else held and f"held-out {held}", speed and f"{speed} tokens/s",
            to_go and f"{to_go} to go")
    return "  ".join(filter(None, said))


def table_of(rows: Iterable[tuple[str, ...]]) -> Any:
    """The rows as a table of rich."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE)
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if i in (0, 1, 4) else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
