"""What a run shows while it goes: a bar on stderr, and `metrics.jsonl`, one line for each step and evaluation."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from deltaw.store.atomic import replace_text
from deltaw.train.memory import memory_in_use
from deltaw.train.state import State, Watch

_LINES = 20  # lines in a whole run where there is no terminal to draw a bar on


class MetricsLog:
    """Appends to a file of JSON lines, each with its `step` and its `event`, "step" or "eval"."""

    def __init__(self, path: Path, *, after: int | None = None) -> None:
        """Starts anew, or keeps the lines up to step `after`, those that a resumed run will not write again."""
        self.path = path
        rows = [row for row in read_metrics(path) if row["step"] <= after] if after is not None else []
        replace_text(path, "".join(json.dumps(row) + "\n" for row in rows))

    def step(self, state: State, *, loss: float, rate: float, norm: float) -> None:
        """Write a step's loss, learning rate, gradient length and totals."""
        self._write(event="step", step=state.step, loss=loss, learning_rate=rate, grad_norm=norm, tokens=state.tokens,
                    seconds=round(state.seconds, 3))

    def evaluated(self, state: State, figures: Mapping[str, float]) -> None:
        """Write an evaluation's figures."""
        self._write(event="eval", step=state.step, **figures)

    def _write(self, **row: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; a last line that a crash cut short is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


class ProgressBar:
    """A bar on stderr with loss, tokens per second, time to go and memory; plain lines where stderr is no terminal."""

    def __init__(self, total: int, *, begun: int = 0, device: torch.device | None = None) -> None:
        """`begun` steps are done already; memory is shown of `device`, the process's own for None."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.total, self.device = total, device or torch.device("cpu")
        self._first: tuple[int, float] | None = None
        console = Console(stderr=True)
        self._bar = Progress(TextColumn("training"), BarColumn(), MofNCompleteColumn(),
                             TextColumn("{task.fields[note]}"), TimeRemainingColumn(), console=console,
                             transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("training", total=total, completed=begun, note="")
        self._lines = not console.is_terminal
        self._held_out = ""

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def step(self, state: State, *, loss: float, rate: float, norm: float) -> None:
        """Move the bar by a step."""
        if self._first is None:  # the first step warms caches up: speed is counted from its end
            self._first = (state.tokens, state.seconds)
        tokens, seconds = state.tokens - self._first[0], state.seconds - self._first[1]
        speed = f"{tokens / seconds:,.0f} tokens/s  " if seconds > 0 else ""
        note = f"loss {loss:.4f}  {self._held_out}{speed}{memory_in_use(self.device) / 2**30:.1f} GiB"
        self._bar.update(self._task, completed=state.step, note=note)
        if self._lines and (state.step % max(1, self.total // _LINES) == 0 or state.step == self.total):
            print(f"step {state.step}/{self.total}  {note}", file=sys.stderr, flush=True)

    def evaluated(self, state: State, figures: Mapping[str, float]) -> None:
        """Show the held-out figures from now on."""
        shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        if self._lines:
            print(f"step {state.step}/{self.total}  held-out {shown}", file=sys.stderr, flush=True)
        else:
            self._held_out = f"held-out {shown}  "


class Together:
    """Several watches as one."""

    def __init__(self, watches: Sequence[Watch]) -> None:
        self.watches = watches

    def step(self, state: State, *, loss: float, rate: float, norm: float) -> None:
        """Tell each of a step."""
        for watch in self.watches:
            watch.step(state, loss=loss, rate=rate, norm=norm)

    def evaluated(self, state: State, figures: Mapping[str, float]) -> None:
        """Tell each of an evaluation."""
        for watch in self.watches:
            watch.evaluated(state, figures)
