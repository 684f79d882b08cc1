"""The log is kept in step with the run; memory is measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from deltaw.train.memory import memory_in_use, peak_memory
from deltaw.train.progress import MetricsLog, ProgressBar, Together, read_metrics
from deltaw.train.state import State
from deltaw.train.summary import duration, shortened, size


def filled(path: Path) -> MetricsLog:
    log = MetricsLog(path)
    log.evaluated(State(), {"loss": 4.0})
    for step in (1, 2, 3):
        log.step(State(step=step, tokens=10 * step, seconds=0.5 * step), loss=3.0 / step, rate=0.1, norm=1.0)
    log.evaluated(State(step=3), {"loss": 1.5, "f1": 0.5})
    return log


def test_each_line_is_an_object_with_its_step(tmp_path: Path) -> None:
    filled(tmp_path / "metrics.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    events = [(row["event"], row["step"]) for row in rows]
    assert events == [("eval", 0), ("step", 1), ("step", 2), ("step", 3), ("eval", 3)]
    assert rows[1] == {"event": "step", "step": 1, "loss": 3.0, "learning_rate": 0.1, "grad_norm": 1.0, "tokens": 10,
                       "seconds": 0.5}


def test_resuming_drops_what_will_be_written_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    filled(path)
    with path.open("a") as file:
        file.write('{"event": "step", "st')
    MetricsLog(path, after=2)
    assert [row["step"] for row in read_metrics(path)] == [0, 1, 2]
    MetricsLog(path)
    assert read_metrics(path) == []


def test_lines_instead_of_a_bar_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(40) as bar:
        both = Together([bar, bar])
        for step in range(1, 41):
            both.step(State(step=step, tokens=100 * step, seconds=0.1 * step), loss=2.5, rate=0.1, norm=1.0)
        bar.evaluated(State(step=40), {"loss": 2.0})
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.splitlines()
    assert len(lines) == 2 * 20 + 1
    assert lines[-2].startswith("step 40/40  loss 2.5000  1,000 tokens/s  ")
    assert lines[-2].endswith(" GiB")
    assert lines[-1] == "step 40/40  held-out loss 2"


def test_memory_is_what_the_process_holds() -> None:
    before = memory_in_use()
    held = torch.ones(50_000_000)
    assert before + 150e6 < memory_in_use() < before + 400e6
    assert peak_memory() > before + 3.9 * held.numel()  # the kernel counts pages in batches


def test_quantities_are_written_for_people() -> None:
    assert [size(n) for n in (5, 2048, 5.25e6, 3 * 2**30)] == ["5 bytes", "2.0 KiB", "5.0 MiB", "3.00 GiB"]
    assert [duration(s) for s in (3.21, 125, 7300)] == ["3.2 s", "2 min 5 s", "2 h 1 min"]
    assert shortened("a" * 400, 10) == "aaaaa … aaaaa"
