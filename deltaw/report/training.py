"""The page of a training run: before and after, the loss, answers, cost, and what was checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deltaw.errors import ConfigError, Fault, TrainingError
from deltaw.report.chart import Line, Point, line_chart, smoothed
from deltaw.report.page import escape, figure, folded, page, section, write_page
from deltaw.report.table import Column, table
from deltaw.train.result import TrainResult
from deltaw.train.summary import cost_rows, figure_rows


def write_report(result: TrainResult, path: str | Path) -> Path:
    """Write the page of a run and return its path; TrainingError where it cannot be written."""
    try:
        return write_page(report_page(result), path)
    except ConfigError as error:
        fault = error.faults[0]
        assert isinstance(fault, Fault)
        raise TrainingError(Fault(fault.where, fault.got, fault.expected, "The adapter itself is saved")) from error


def report_page(result: TrainResult) -> str:
    """The page as text."""
    title = f"{Path(result.adapter).name}: an adapter of {Path(result.base).name or result.base}"
    held_out = f"{result.data.get('valid_rows', 0):,} held-out rows"
    data = [(name.replace("_", " "), _plain(value)) for name, value in result.data.items()]
    sections = [
        section("Before and after", _figures(result), held_out),
        section("Loss", figure(_loss_chart(result), "Loss of the training steps, smoothed, and of the held-out rows")),
        section("Answers", _answers(result), "to held-out prompts, the likeliest token each time"),
        section("Cost", _facts(cost_rows(result), "What the run was and cost")),
        section("What the doctor checked", _facts(list(result.checks.items()), "Checks and their outcome")),
        section("What the adapter changes", folded(f"{len(result.sites)} sites", _sites(result))),
        section("Data", _facts(data, "What the run read")),
        section("Config", folded("every option", f"<pre>{escape(json.dumps(result.config, indent=2))}</pre>")),
    ]
    made = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    return page(title, sections, footer=made)


def _figures(result: TrainResult) -> str:
    columns = (Column("figure"), Column("before", figure=True), Column("after", figure=True))
    return table(columns, figure_rows(result), caption="Held-out figures before and after", strong_last=True)


def _facts(rows: list[tuple[str, str]], caption: str) -> str:
    return table((Column(""), Column("")), rows, caption=caption)


def _loss_chart(result: TrainResult) -> str:
    train = [(float(row["step"]), float(row["loss"])) for row in result.curve if row.get("event") == "step"]
    held: list[Point] = [(float(row["step"]), float(row["loss"])) for row in result.curve if row.get("event") == "eval"]
    window = max(1, len(train) // 25)
    lines = [Line("training", smoothed(train, window=window), "train"), Line("held-out", held, "held", dots=True)]
    return line_chart([line for line in lines if line.points], x_label="step", y_label="loss",
                      from_zero=False)


def _answers(result: TrainResult) -> str:
    rows = [(a.prompt, a.expected, a.before, a.after) for a in result.answers]
    columns = [Column(name) for name in ("prompt", "expected", "before", "after")]
    return table(columns, rows, caption="Answers before and after", keep_lines=True)


def _sites(result: TrainResult) -> str:
    rows = [(row.site, row.kind, " × ".join(map(str, row.shape)), str(row.rank or ""), f"{row.parameters:,}")
            for row in result.sites]
    columns = [Column("site"), Column("kind"), Column("base weight"), Column("rank"), Column("trained values")]
    return table(columns, rows, caption="The sites and their sizes")


def _plain(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
