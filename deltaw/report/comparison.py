"""The page of `deltaw compare` and `deltaw sweep`: which arm to take, the table, the paper's rows beside it, curves."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from deltaw.compare import StudyResult
from deltaw.compare.columns import Columns, grid_columns, published_columns, study_columns
from deltaw.compare.figures import heading, scale, shown
from deltaw.compare.noise import Measured
from deltaw.compare.published import LOW_DATA, SWEEPS, TABLES
from deltaw.compare.table import Row
from deltaw.report import study_findings as said
from deltaw.report.chart import Line, line_chart
from deltaw.report.dots import dot_chart
from deltaw.report.page import escape, figure, finding, folded, page, section, side_by_side
from deltaw.report.table import Cell, Column, number, table

_CURVES = 6
"""Curves that one chart can tell apart."""


def study_page(result: StudyResult) -> str:
    """The page as text."""
    title = f"{result.kind}: {Path(result.folder).name}"
    train = result.config["train"]
    found = study_columns(result.rows, result.judged_by)
    budget = result.config.get("budget")
    sections = [
        section("What to take", finding(result.advice.text if result.advice else "")),
        section("Results", _table(found, "One row for each arm", sortable=True),
                "; ".join(("mean ± standard deviation between seeds; as " + ("Tables 2 to 4" if result.kind == "compare"
                          else "Table 5") + " of the LoRA paper", *found.notes))),
        section("At equal size", _at_equal_size(result) if budget else "", "Table 5 of the LoRA paper has this form"),
        section("By rank", "" if budget else _by_rank(result), "Tables 6 and 18 of the LoRA paper have this form"),
        section("With few examples", _by_size(result) if any(row.size for row in result.rows) else "",
                "Table 16 of the LoRA paper has this form"),
        section("The paper's rows", _published(result), "other models and budgets: compare orders and distances"),
        section("Arms side by side", figure(_side_by_side(result), "mean and one standard deviation between seeds; the "
                                                                   "axis does not begin at 0")),
        section("Held-out loss", _curves(result)),
        section("Intrinsic dimension", _intrinsic(result)),
        section("Latency", _latency(result), "one forward pass, median; Table 1 of the LoRA paper has this form"),
        section("Not finished", _missing(result.rows)),
        section("Left behind by halving", finding(", ".join(result.dropped))),
        section("Config", folded("every option", f"<pre>{escape(json.dumps(result.config, indent=2))}</pre>")),
    ]
    return page(title, sections, lead=f"{train['model']}, trained on {train['data']}, judged by {result.judged_by}")


def _table(found: Columns, caption: str, *, sortable: bool = False) -> str:
    columns = [Column(name, figure=number_of >= found.texts) for number_of, name in enumerate(found.headings)]
    rows = [[cell if isinstance(cell, str) else Cell(cell.text, cell.value) for cell in row] for row in found.rows]
    return table(columns, rows, caption=caption, sortable=sortable)


def _at_equal_size(result: StudyResult) -> str:
    """A column for each target set at the rank that the budget gives it; a row for each scale and rate, or figure."""
    rows = {row.arm: row for row in result.rows}
    points: dict[str, dict[str, Row]] = {}
    for targets in result.config["targets"]:
        for arm, (rest, rank) in result.ranks.items():
            if arm in rows and (rest == targets or rest.startswith(f"{targets} ")):
                points.setdefault(rest.removeprefix(targets).strip(), {})[f"{targets}, r={rank}"] = rows[arm]
    sets = list(dict.fromkeys(name for of in points.values() for name in of))
    if len(sets) < 2:
        return ""
    names = list(dict.fromkeys(name for row in result.rows for name in row.figures))
    lines: list[list[str | Cell]] = []
    for rest, of in points.items():
        shown_of = names if len(points) == 1 else [name for name in names if name == result.judged_by]
        lines += [[rest or heading(name), *(_measured(name, of[at].figures.get(name) if at in of else None)
                                            for at in sets)] for name in shown_of]
    first = next(iter(points.values()))
    lines.append(["trained values", *(number(first[at].parameters if at in first and first[at].seeds else None, ",d")
                                      for at in sets)])
    caption = f"At most {result.config['budget']:,} values" + (
        "" if len(points) == 1 else f": {heading(result.judged_by)}")
    return table([Column(""), *(Column(name, figure=True) for name in sets)], lines, caption=caption) + finding(
        *said.at_equal_size(result))


def _by_rank(result: StudyResult) -> str:
    """Ranks side by side, a row for what the arms have in common; and the same as curves."""
    figures = {row.arm: row.figures.get(result.judged_by) for row in result.rows}
    ranks = sorted({rank for _, rank in result.ranks.values()})
    if len(ranks) < 2:
        return ""
    found: dict[str, dict[int, Measured | None]] = {}
    for arm, (rest, rank) in result.ranks.items():
        found.setdefault(rest or "every run", {})[rank] = figures.get(arm)
    columns = [Column(""), *(Column(f"r = {rank}", figure=True) for rank in ranks)]
    rows = [[rest, *(_measured(result.judged_by, of.get(rank)) for rank in ranks)] for rest, of in found.items()]
    times = scale(result.judged_by)
    lines = [Line(rest, [(math.log2(rank), times * value.mean) for rank, value in sorted(of.items()) if value],
                  f"s{n + 1}", dots=True) for n, (rest, of) in enumerate(list(found.items())[:_CURVES])]
    chart = line_chart(lines, x_label="log₂ r", y_label=heading(result.judged_by), from_zero=False)
    caption = f"{heading(result.judged_by)} over the rank, on a scale of powers of two; the axis does not begin at 0"
    return (table(columns, rows, caption=f"{heading(result.judged_by)} by rank") + finding(*said.by_rank(result))
            + figure(chart, caption))


def _by_size(result: StudyResult) -> str:
    sizes = sorted({row.size for row in result.rows}, key=lambda size: size or math.inf)
    columns = [Column("arm"), *(Column(f"{size:,}" if size else "all", figure=True) for size in sizes)]
    arms = list(dict.fromkeys(row.arm for row in result.rows))
    found = {(row.arm, row.size): row.figures.get(result.judged_by) for row in result.rows}
    rows = [[arm, *(_measured(result.judged_by, found.get((arm, size))) for size in sizes)] for arm in arms]
    ours = table(columns, rows, caption=f"{heading(result.judged_by)} by number of training examples")
    return ours + finding(*said.by_size(result)) + _table(published_columns(LOW_DATA), LOW_DATA.title, sortable=True)


def _published(result: StudyResult) -> str:
    """The rows of the paper's table of this task, with this study's figures beside them; of a sweep, its tables."""
    paper = str(result.config.get("paper"))
    if result.kind == "sweep":
        return "".join(_table(grid_columns(grid), grid.title) for grid in SWEEPS.get(paper, ()))
    if paper not in TABLES:
        return ""
    return _table(published_columns(TABLES[paper], result.rows), TABLES[paper].title, sortable=True)


def _side_by_side(result: StudyResult) -> str:
    found = {row.arm: row.figures[result.judged_by].times(scale(result.judged_by)) for row in result.rows
             if row.size is None and result.judged_by in row.figures}
    return dot_chart(found, x_label=heading(result.judged_by))


def _curves(result: StudyResult) -> str:
    curves = [(arm, curve) for arm, curve in result.curves.items() if len(curve) > 1]  # one point is no curve
    lines = [Line(arm, [(float(step), loss) for step, loss in curve], f"s{number_of + 1}")
             for number_of, (arm, curve) in enumerate(curves[:_CURVES])]
    chart = line_chart(lines, x_label="step", y_label="held-out loss", from_zero=False)
    return finding(*said.curves(dict(curves))) + figure(
        chart, f"of each arm's first seed; at most {_CURVES} arms; the axis does not begin at 0") if chart else ""


def _intrinsic(result: StudyResult) -> str:
    if not result.intrinsic:
        return ""
    words = [f"{one.measure}: d₉₀ = {one.d90:,}" if one.d90 else f"{one.measure}: no d₉₀" for one in result.intrinsic]
    words = [text + f" (target {one.target:.3g}, 90 % of full fine-tuning's {one.full:.3g})"
             + (f"; {one.note}" if one.note else "") for text, one in zip(words, result.intrinsic, strict=True)]
    lines = [Line(one.measure, [(math.log10(d), value) for d, value in one.curve], f"s{n + 1}", dots=True)
             for n, one in enumerate(result.intrinsic)]
    chart = line_chart(lines, x_label="log₁₀ of the dimension", y_label=result.judged_by, from_zero=False)
    return finding(*words) + figure(chart, f"{result.judged_by} of training in a random subspace of d dimensions")


def _latency(result: StudyResult) -> str:
    timed = [row for row in result.rows if row.latency]
    timed = [row for row in timed if row.size is None] or timed
    tables = []
    for batch in ("1", "16"):
        columns = [Column("arm"), Column("base, ms", figure=True), Column("changed, ms", figure=True),
                   Column("more", figure=True), Column("merged, ms", figure=True)]
        rows = [[row.arm, _ms(row, f"base_{batch}"), _ms(row, f"tuned_{batch}"),
                 number(100 * (row.latency[f"tuned_{batch}"] / row.latency[f"base_{batch}"] - 1), "+.0f"),
                 _ms(row, f"merged_{batch}")] for row in timed if f"base_{batch}" in row.latency]
        tables.append(table(columns, rows, caption=f"{batch} row{'s' if batch != '1' else ''}; more is in %"))
    return finding(*said.latency(timed)) + side_by_side(tables) if timed else ""


def _missing(rows: Sequence[Row]) -> str:
    lines = [[row.arm, "does not apply", row.not_applicable] for row in rows if row.not_applicable]
    lines += [[row.arm, f"seed {seed} failed", why] for row in rows for seed, why in row.failed.items()]
    return table((Column("arm"), Column("what"), Column("why")), lines, caption="Arms and seeds without a figure")


def _measured(figure: str, value: Measured | None) -> str | Cell:
    return number(None) if value is None else Cell(shown(figure, value), value.mean)


def _ms(row: Row, name: str) -> str | Cell:
    return number(1000 * row.latency[name] if name in row.latency else None, ".3g")
