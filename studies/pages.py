"""A study's table as a page in Markdown: what was run, on how much, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from deltaw.compare.columns import Columns, grid_columns, published_columns, study_columns
from deltaw.compare.published import SWEEPS, TABLES
from deltaw.compare.table import Row

Values = Mapping[str, Any]


def results_page(study: str, config: Path, work: Path) -> str:
    """The page of a finished study below `work`; the first line of its config says what it is."""
    result = json.loads((work / study / "study.json").read_text(encoding="utf-8"))
    rows = [Row.from_dict(row) for row in result["rows"]]
    about = config.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
    analysed = f", what its adapters share is [{study}.analysis.html]({study}.analysis.html)" \
        if (work / study / "analysis.html").is_file() else ""
    parts = [f"# {study}", about, f"Regenerate: `python studies/run.py {study} --data DATA`. The page with all figures "
             f"is [{study}.html]({study}.html){analysed}, the numbers are [{study}.json]({study}.json).",
             _budget(result, list((work / study).rglob("train_result.json"))),
             _table(rows, result["judged_by"]),
             result["advice"]["text"] if result["advice"] else "", _not_finished(rows), _published(result, rows)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _budget(result: Values, files: Sequence[Path]) -> str:
    """What every run was given, and how long it took by the median step."""
    train, runs = result["config"]["train"], [json.loads(file.read_text(encoding="utf-8")) for file in files]
    if not runs:
        return ""
    versions, precision = runs[0]["versions"], runs[0]["precision"].split(":")[0]
    finished = sum(len(row["seeds"]) for row in result["rows"])
    steps = train["max_steps"] or median(run["steps"] for run in runs)
    seconds = sum(len(row["seeds"]) * row["step_seconds"] * steps for row in result["rows"])
    beams = result["config"]["beams"]["num_beams"]
    return (f"**Budget.** {finished} runs, {len(result['rows'])} arms; {steps:g} steps of "
            f"{train['batch_size']} examples of {runs[0]['data']['train_rows']:,}, "
            f"{median(run['tokens'] for run in runs):,.0f} tokens in the median run; judged on "
            f"{result['config']['test_rows'] or 'all'} test rows" + (f", {beams} beams" if beams > 1 else "")
            + f". {precision}, torch {versions['torch']}, transformers {versions['transformers']}. By the median step "
            f"all training takes {seconds / 60:.0f} minutes, on a machine that was not quiet.")


def _table(rows: Sequence[Row], judged_by: str) -> str:
    found = study_columns(rows, judged_by)
    return "\n\n".join([_markdown(found), *(note.replace("*", r"\*", 1) for note in found.notes)])


def _published(result: Values, rows: Sequence[Row]) -> str:
    paper = str(result["config"].get("paper"))
    if result["kind"] == "sweep":
        found = {grid.title: grid_columns(grid) for grid in SWEEPS.get(paper, ())}
    else:
        found = {TABLES[paper].title: published_columns(TABLES[paper], rows)} if paper in TABLES else {}
    return "\n\n".join(f"**{title}**, as published: other models and budgets.\n\n{_markdown(columns)}"
                       for title, columns in found.items())


def _not_finished(rows: Sequence[Row]) -> str:
    lines = [f"- {row.arm} does not apply: {row.not_applicable}" for row in rows if row.not_applicable]
    lines += [f"- {row.arm}, seed {seed}, failed: {why}" for row in rows for seed, why in row.failed.items()]
    return "\n".join(lines)


def _markdown(found: Columns) -> str:
    lines = [found.headings, *([cell if isinstance(cell, str) else cell.text for cell in row] for row in found.rows)]
    head, *body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, "|---" * found.texts + "|---:" * (len(found.headings) - found.texts) + "|", *body])
