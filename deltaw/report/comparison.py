"""The page of `deltaw compare` and `deltaw sweep`: which arm to take, the table, the paper's rows beside it, curves."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from deltaw.compare import StudyResult
from deltaw.compare.figures import heading, scale, shown
from deltaw.compare.noise import Measured
from deltaw.compare.published import LOW_DATA, TABLES, Table
from deltaw.compare.table import Row
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
    sized = any(row.size for row in result.rows)
    sections = [
        section("What to take", finding(result.advice.text if result.advice else "")),
        section("Results", _results(result, sized), "mean ± standard deviation between seeds; as "
                + ("Tables 2 to 4" if result.kind == "compare" else "Table 5") + " of the LoRA paper"
                + _of_several(result)),
        section("By rank", _by_rank(result), "Tables 6 and 18 of the LoRA paper have this form"),
        section("With few examples", _by_size(result) if sized else "", "Table 16 of the LoRA paper has this form"),
        section("The paper's rows", _published(result), "other models and budgets: compare orders and distances"),
        section("Arms side by side", figure(_side_by_side(result), "mean and one standard deviation between seeds; the "
                                                                   "axis does not begin at 0")),
        section("Held-out loss", figure(_curves(result), f"of each arm's first seed; at most {_CURVES} arms")),
        section("Intrinsic dimension", _intrinsic(result)),
        section("Latency", _latency(result), "one forward pass, median; Table 1 of the LoRA paper has this form"),
        section("Not finished", _missing(result.rows)),
        section("Left behind by halving", finding(", ".join(result.dropped))),
        section("Config", folded("every option", f"<pre>{escape(json.dumps(result.config, indent=2))}</pre>")),
    ]
    return page(title, sections, lead=f"{train['model']}, trained on {train['data']}, judged by {result.judged_by}")


def _results(result: StudyResult, sized: bool) -> str:
    names = _figures(result.rows)
    columns = [Column("arm"), *([Column("examples", figure=True)] if sized else []),
               *(Column(heading(name), figure=True) for name in names), Column("trained values", figure=True),
               Column("% of base", figure=True), Column("saved, MiB", figure=True),
               Column("peak memory, MiB", figure=True), Column("step, s", figure=True), Column("seeds", figure=True)]
    rows = [[row.arm, *([_size(row)] if sized else []), *(_measured(name, row.figures.get(name)) for name in names),
             number(row.parameters, ",d"), number(100 * row.share, ".3g"), number(row.bytes / 2**20, ",.2f"),
             _shared(row, number(row.peak_memory / 2**20, ",.0f")), _shared(row, number(row.step_seconds, ".2g")),
             number(len(row.seeds), "d")]
            for row in result.rows if row.figures]
    return table(columns, rows, caption="One row for each arm", sortable=True)


def _of_several(result: StudyResult) -> str:
    if all(row.together == 1 for row in result.rows):
        return ""
    return ("; * of runs that trained in one process: the memory of all of them, and of shared passes the share of the "
            "time by tokens (--together off measures each alone)")


def _shared(row: Row, value: str | Cell) -> str | Cell:
    """A figure that is not the arm's alone, with its mark."""
    return Cell(f"{value.text} *", value.value) if isinstance(value, Cell) and row.together > 1 else value


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
    chart = line_chart(lines, x_label="log₂ r", y_label=heading(result.judged_by))
    return table(columns, rows, caption=f"{heading(result.judged_by)} by rank") + figure(
        chart, f"{heading(result.judged_by)} over the rank, on a scale of powers of two")


def _by_size(result: StudyResult) -> str:
    sizes = sorted({row.size for row in result.rows}, key=lambda size: size or math.inf)
    columns = [Column("arm"), *(Column(f"{size:,}" if size else "all", figure=True) for size in sizes)]
    arms = list(dict.fromkeys(row.arm for row in result.rows))
    found = {(row.arm, row.size): row.figures.get(result.judged_by) for row in result.rows}
    rows = [[arm, *(_measured(result.judged_by, found.get((arm, size))) for size in sizes)] for arm in arms]
    ours = table(columns, rows, caption=f"{heading(result.judged_by)} by number of training examples")
    return ours + _table_of(LOW_DATA)


def _published(result: StudyResult) -> str:
    paper = str(result.config.get("paper"))
    ours = {row.arm: row.figures[result.judged_by] for row in result.rows
            if row.size is None and result.judged_by in row.figures}
    return _table_of(TABLES[paper], ours, result.judged_by) if paper in TABLES else ""


def _table_of(published: Table, ours: Mapping[str, Measured] | None = None, judged_by: str = "") -> str:
    """The paper's rows, and in a last column this study's figure of the same method."""
    names = list(dict.fromkeys(name for row in published.rows for name in row.figures))
    columns = [Column("method"), Column("model"), Column("trained values", figure=True),
               *(Column(name, figure=True) for name in names),
               *([Column(f"here: {heading(judged_by)}", figure=True)] if ours else [])]
    rows = [[row.method, row.model, number(row.parameters or None, ",.0f"),
             *(Cell(f"{row.figures[name]:g}" + (f" ± {row.spread[name]:g}" if name in row.spread else ""),
                    row.figures[name]) for name in names),
             *([_measured(judged_by, ours.get(row.method))] if ours else [])] for row in published.rows]
    return table(columns, rows, caption=published.title, sortable=True)


def _side_by_side(result: StudyResult) -> str:
    found = {row.arm: row.figures[result.judged_by].times(scale(result.judged_by)) for row in result.rows
             if row.size is None and result.judged_by in row.figures}
    return dot_chart(found, x_label=heading(result.judged_by))


def _curves(result: StudyResult) -> str:
    curves = [(arm, curve) for arm, curve in result.curves.items() if len(curve) > 1]  # one point is no curve
    lines = [Line(arm, [(float(step), loss) for step, loss in curve], f"s{number_of + 1}")
             for number_of, (arm, curve) in enumerate(curves[:_CURVES])]
    return line_chart(lines, x_label="step", y_label="held-out loss")


def _intrinsic(result: StudyResult) -> str:
    if not result.intrinsic:
        return ""
    said = [f"{one.measure}: d₉₀ = {one.d90:,}" if one.d90 else f"{one.measure}: no d₉₀" for one in result.intrinsic]
    said = [text + f" (target {one.target:.3g}, 90 % of full fine-tuning's {one.full:.3g})"
            + (f"; {one.note}" if one.note else "") for text, one in zip(said, result.intrinsic, strict=True)]
    lines = [Line(one.measure, [(math.log10(d), value) for d, value in one.curve], f"s{n + 1}", dots=True)
             for n, one in enumerate(result.intrinsic)]
    chart = line_chart(lines, x_label="log₁₀ of the dimension", y_label=result.judged_by)
    return finding(*said) + figure(chart, f"{result.judged_by} of training in a random subspace of d dimensions")


def _latency(result: StudyResult) -> str:
    timed = [row for row in result.rows if row.latency]
    tables = []
    for batch in ("1", "16"):
        columns = [Column("arm"), Column("base, ms", figure=True), Column("changed, ms", figure=True),
                   Column("more", figure=True), Column("merged, ms", figure=True)]
        rows = [[row.arm, _ms(row, f"base_{batch}"), _ms(row, f"tuned_{batch}"),
                 number(100 * (row.latency[f"tuned_{batch}"] / row.latency[f"base_{batch}"] - 1), "+.0f"),
                 _ms(row, f"merged_{batch}")] for row in timed if f"base_{batch}" in row.latency]
        tables.append(table(columns, rows, caption=f"{batch} row{'s' if batch != '1' else ''}; more is in %"))
    return side_by_side(tables) if timed else ""


def _missing(rows: Sequence[Row]) -> str:
    lines = [[row.arm, "does not apply", row.not_applicable] for row in rows if row.not_applicable]
    lines += [[row.arm, f"seed {seed} failed", why] for row in rows for seed, why in row.failed.items()]
    return table((Column("arm"), Column("what"), Column("why")), lines, caption="Arms and seeds without a figure")


def _figures(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.figures))


def _measured(figure: str, value: Measured | None) -> str | Cell:
    return number(None) if value is None else Cell(shown(figure, value), value.mean)


def _size(row: Row) -> Cell:
    return Cell(f"{row.size:,}", row.size) if row.size else Cell("all", math.inf)


def _ms(row: Row, name: str) -> str | Cell:
    return number(1000 * row.latency[name] if name in row.latency else None, ".3g")
