"""A study's table as a page in Markdown: what was run, on how much, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from deltaw.compare.figures import heading, shown
from deltaw.compare.noise import Measured
from deltaw.compare.published import TABLES

Values = Mapping[str, Any]


def results_page(study: str, config: Path, work: Path) -> str:
    """The page of a finished study below `work`; the first line of its config says what it is."""
    result = json.loads((work / study / "study.json").read_text(encoding="utf-8"))
    about = config.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
    analysed = f", what its adapters share is [{study}.analysis.html]({study}.analysis.html)" \
        if (work / study / "analysis.html").is_file() else ""
    parts = [f"# {study}", about, f"Regenerate: `python studies/run.py {study} --data DATA`. The page with all figures "
             f"is [{study}.html]({study}.html){analysed}, the numbers are [{study}.json]({study}.json).",
             _budget(result, list((work / study).rglob("train_result.json"))), _table(result),
             result["advice"]["text"] if result["advice"] else "", _not_finished(result), _published(result)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _budget(result: Values, files: Sequence[Path]) -> str:
    """What every run was given, and how long it took by the median step."""
    train, runs = result["config"]["train"], [json.loads(file.read_text(encoding="utf-8")) for file in files]
    if not runs:
        return ""
    versions, precision = runs[0]["versions"], runs[0]["precision"].split(":")[0]
    finished = sum(len(row["seeds"]) for row in result["rows"])
    seconds = sum(len(row["seeds"]) * row["step_seconds"] * train["max_steps"] for row in result["rows"])
    beams = result["config"]["beams"]["num_beams"]
    return (f"**Budget.** {finished} runs, {len(result['rows'])} arms; {train['max_steps']} steps of "
            f"{train['batch_size']} examples of {runs[0]['data']['train_rows']:,}, "
            f"{median(run['tokens'] for run in runs):,.0f} tokens in the median run; judged on "
            f"{result['config']['test_rows'] or 'all'} test rows" + (f", {beams} beams" if beams > 1 else "")
            + f". {precision}, torch {versions['torch']}, transformers {versions['transformers']}. By the median step "
            f"all training takes {seconds / 60:.0f} minutes, on a machine that was not quiet.")


def _table(result: Values) -> str:
    done = [row for row in result["rows"] if row["figures"]]
    names = list(dict.fromkeys(name for row in done for name in row["figures"]))
    lines = [["arm", *(heading(name) for name in names), "trained values", "% of base", "saved, MiB",
              "peak memory, MiB", "step, s", "seeds"]]
    for row in done:
        lines.append([row["arm"], *(_shown(name, row["figures"].get(name)) for name in names), f"{row['parameters']:,}",
                      f"{100 * row['share']:.3g}", f"{row['bytes'] / 2**20:.2f}", f"{row['peak_memory'] / 2**20:,.0f}",
                      f"{row['step_seconds']:.2g}", str(len(row["seeds"]))])
    return _markdown(lines)


def _published(result: Values) -> str:
    paper = TABLES.get(str(result["config"].get("paper")))
    if paper is None:
        return ""
    names = list(dict.fromkeys(name for row in paper.rows for name in row.figures))
    lines = [["method", "model", "trained values", *names]]
    for row in paper.rows:
        lines.append([row.method, row.model, f"{row.parameters:,.0f}", *(f"{row.figures[name]:g}" for name in names)])
    return f"**{paper.title}**, as published: other models and budgets.\n\n{_markdown(lines)}"


def _not_finished(result: Values) -> str:
    rows = result["rows"]
    lines = [f"- {row['arm']} does not apply: {row['not_applicable']}" for row in rows if row["not_applicable"]]
    lines += [f"- {row['arm']}, seed {seed}, failed: {why}" for row in rows for seed, why in row["failed"].items()]
    return "\n".join(lines)


def _shown(name: str, value: Values | None) -> str:
    return "–" if value is None else shown(name, Measured(**value))


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, "|---" + "|---:" * (len(lines[0]) - 1) + "|", *body])
