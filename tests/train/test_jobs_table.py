"""The live table of a set: what each cell says, and that lines without a terminal say it too."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deltaw.train import JobResult, TrainMany
from deltaw.train.jobs_table import COLUMNS, JobsTable, ended_row, line_of, row_of, table_of
from tests.train.many_sets import config_maker, together


def job(**more: Any) -> Any:
    """A job that did 4 of 10 steps, the last 2 of them in this session, in the last 6 seconds."""
    values = {"name": "r8", "status": "running", "state": SimpleNamespace(step=4, tokens=1200, seconds=3.0),
              "session": SimpleNamespace(pace=SimpleNamespace(steps=10)), "loss": 1.25, "figures": {"loss": 2.0},
              "began": time.perf_counter() - 6.0, "begun_at": 2}
    return SimpleNamespace(**{**values, **more})


def test_a_row_has_step_loss_held_out_speed_and_time_to_go() -> None:
    row = row_of(job())
    assert dict(zip(COLUMNS, row, strict=True)) == {
        "job": "r8", "status": "running", "step": "4/10", "loss": "1.2500", "held-out": "loss 2", "tokens/s": "400",
        "to go": "18 s"}  # 3 s a step, 6 steps
    assert line_of(row) == "r8  running  step 4/10  loss 1.2500  held-out loss 2  400 tokens/s  18 s to go"


def test_a_job_that_has_not_begun_shows_no_figures() -> None:
    row = row_of(job(state=SimpleNamespace(step=0, tokens=0, seconds=0.0), loss=None, figures={}, begun_at=0))
    assert row == ("r8", "running", "0/10", "", "", "", "")
    assert line_of(row) == "r8  running  step 0/10"


def test_an_ended_job_shows_why() -> None:
    failed = JobResult(name="bad", status="failed", steps=3, planned_steps=9, error="the loss is nan\nmore")
    assert line_of(ended_row(failed)) == "bad  failed  step 3/9  the loss is nan"


def test_the_table_has_a_line_for_each_job() -> None:
    from rich.console import Console

    console = Console(width=100)
    with console.capture() as captured:
        console.print(table_of([row_of(job()), row_of(job(name="r64"))]))
    text = captured.get()
    assert all(column in text for column in COLUMNS)
    assert [text.count(name) for name in ("r8", "r64", "1.2500", "18 s")] == [1, 1, 2, 2]


def test_without_a_terminal_lines_are_printed(base_folder: Path, color_rows: Path, tmp_path: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    make = config_maker(base_folder, color_rows, tmp_path)
    with TrainMany([make("a"), make("b")], together(tmp_path), quiet=True) as many, JobsTable(quiet=False) as table:
        many.round()
        table.show(many.jobs.values(), ())
        table.show(many.jobs.values(), ())  # too soon: nothing
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[:4] for line in lines] == [[name, "running", "step", "1/12"] for name in "ab"]
    assert all("loss" in line and "tokens/s" in line and "to go" in line for line in lines)
