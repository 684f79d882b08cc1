"""One HTML page about a run that needs nothing else: no network, no script, readable in light and dark."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from deltaw.errors import Fault, TrainingError
from deltaw.report.chart import Line, Point, line_chart, smoothed
from deltaw.train.result import TrainResult
from deltaw.train.summary import cost_rows, figure_rows

_STYLE = Path(__file__).with_name("page.css")


def write_report(result: TrainResult, path: str | Path) -> Path:
    """Write the page of a run and return its path; TrainingError where it cannot be written."""
    target = Path(path).expanduser()
    unfinished = target.with_name(f".{target.name}.unfinished")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(report_page(result), encoding="utf-8")
        unfinished.replace(target)
    except OSError as error:
        raise TrainingError(Fault(f"report '{target}'", f"cannot be written: {error.strerror}", "a writable place",
                                  "The adapter itself is saved")) from error
    return target


def report_page(result: TrainResult) -> str:
    """The page as text."""
    title = f"{Path(result.adapter).name}: an adapter of {Path(result.base).name or result.base}"
    held_out = f"{result.data.get('valid_rows', 0):,} held-out rows"
    sections = [
        _section("Before and after", _table(("", "before", "after"), figure_rows(result), numeric=2), held_out),
        _section("Loss", _loss_chart(result), "of the training steps, smoothed, and of the held-out rows"),
        _section("Answers", _answers(result), "to held-out prompts, the likeliest token each time"),
        _section("Cost", _table(("", ""), cost_rows(result))),
        _section("What the doctor checked", _table(("", ""), list(result.checks.items()))),
        _section("What the adapter changes", _folded(f"{len(result.sites)} sites", _sites(result))),
        _section("Data", _table(("", ""), [(name.replace("_", " "), _plain(v)) for name, v in result.data.items()])),
        _section("Config", _folded("every option", f"<pre>{_escape(json.dumps(result.config, indent=2))}</pre>")),
    ]
    made = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    return "\n".join([
        "<!doctype html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">', f"<title>{_escape(title)}</title>",
        f"<style>\n{_STYLE.read_text(encoding='utf-8')}</style>", "</head>", "<body>", "<main>",
        f"<h1>{_escape(title)}</h1>", *(section for section in sections if section),
        f"<footer>{_escape(made)}</footer>", "</main>", "</body>", "</html>", "",
    ])


def _loss_chart(result: TrainResult) -> str:
    train = [(float(row["step"]), float(row["loss"])) for row in result.curve if row.get("event") == "step"]
    held: list[Point] = [(float(row["step"]), float(row["loss"])) for row in result.curve if row.get("event") == "eval"]
    window = max(1, len(train) // 25)
    lines = [Line("training", smoothed(train, window=window), "train"), Line("held-out", held, "held", dots=True)]
    return line_chart([line for line in lines if line.points], x_label="step", y_label="loss")


def _answers(result: TrainResult) -> str:
    rows = [(a.prompt, a.expected, a.before, a.after) for a in result.answers]
    return _table(("prompt", "expected", "before", "after"), rows, text=True) if rows else ""


def _sites(result: TrainResult) -> str:
    rows = [(row.site, row.kind, " × ".join(map(str, row.shape)), str(row.rank or ""), f"{row.parameters:,}")
            for row in result.sites]
    return _table(("site", "kind", "base weight", "rank", "trained values"), rows)


def _section(title: str, content: str, note: str = "") -> str:
    """A headed part of the page; nothing where it has no content."""
    if not content:
        return ""
    said = f'<p class="note">{_escape(note)}</p>' if note else ""
    return f"<section>\n<h2>{_escape(title)}</h2>\n{said}\n{content}\n</section>"


def _folded(summary: str, content: str) -> str:
    return f"<details>\n<summary>{_escape(summary)}</summary>\n{content}\n</details>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numeric: int = 0, text: bool = False) -> str:
    """A table whose last `numeric` columns are figures; `text` keeps line breaks in cells."""
    rows = list(rows)
    if not rows:
        return ""
    first = len(head) - numeric
    kinds = [' class="figure"' if column >= first else "" for column in range(len(head))]
    body = "\n".join("<tr>" + "".join(f"<td{kind}>{_escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True))
                     + "</tr>" for row in rows)
    titles = "".join(f"<th{kind}>{_escape(name)}</th>" for kind, name in zip(kinds, head, strict=True))
    top = f"<thead><tr>{titles}</tr></thead>\n" if any(head) else ""
    return f'<div class="wide"><table{" class=text" if text else ""}>\n{top}<tbody>\n{body}\n</tbody></table></div>'


def _plain(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _escape(text: str) -> str:
    return html.escape(str(text))
