"""The one table of a study, and the paper's rows beside it, as every form shows them: page, terminal and Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from deltaw.compare.figures import heading, reported, shown
from deltaw.compare.noise import Measured
from deltaw.compare.published import Grid, Table
from deltaw.compare.table import Row

_LATENCY = {"tuned_1": "1 row, ms", "merged_1": "1 row merged, ms", "tuned_16": "16 rows, ms",
            "merged_16": "16 rows merged, ms"}
TOGETHER = ("* of runs that trained in one process: the memory of all of them, and of shared passes the share of the "
            "time by tokens (--together off measures each alone)")
LATENCY = "ms: a forward pass of up to 128 tokens a row, median; merged: the change added to the weights"


@dataclass(frozen=True, slots=True)
class Entry:
    """What stands in a column of figures, and the value that it sorts by."""

    text: str
    value: float


NOTHING = Entry("–", -math.inf)


@dataclass(frozen=True, slots=True)
class Columns:
    """A table: its headings, its rows, and what has to be said about them. Only columns of `texts` hold words."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str | Entry, ...], ...]
    notes: tuple[str, ...] = ()
    texts: int = 1


def study_columns(rows: Sequence[Row], judged_by: str) -> Columns:
    """A line for each arm and size; one that has no figure says why, and one that lacks some seeds how many."""
    names = list(dict.fromkeys(name for row in rows for name in row.figures)) or [judged_by]
    sized = any(row.size for row in rows)
    latency = [name for name in _LATENCY if any(name in row.latency for row in rows)]
    headings = ["arm", *(["examples"] if sized else []), *map(heading, names), "trained values", "% of base",
                "saved, MiB", "peak memory, MiB", "step, s", *(_LATENCY[name] for name in latency), "seeds"]
    lines: list[tuple[str | Entry, ...]] = []
    for row in rows:
        times = (_number(1000 * row.latency[name], ".3g") if name in row.latency else NOTHING for name in latency)
        lines.append((_arm(row), *([_size(row)] if sized else []), *(_figure(row, name) for name in names),
                      *_costs(row), *times, _number(len(row.seeds), "d") if row.seeds else NOTHING))
    head = max((row.head for row in rows), default=0)
    notes = [TOGETHER] if any(row.together > 1 for row in rows) else []
    notes += [LATENCY] if latency else []
    notes += [f"trained values and % of base leave out the classifier's new head, as papers do: {head:,} values more"
              ] if head else []
    return Columns(tuple(headings), tuple(lines), tuple(notes))


def published_columns(published: Table, rows: Sequence[Row] = ()) -> Columns:
    """The paper's rows, and in the last columns this study's figures of the same methods, each that both have."""
    names = list(dict.fromkeys(name for row in published.rows for name in row.figures))
    ours = {row.arm: row.figures for row in rows if row.size is None}
    here = [name for name in (reported(name, rows) for name in names) if any(name in of for of in ours.values())]
    lines: list[tuple[str | Entry, ...]] = []
    for row in published.rows:
        printed = [Entry(f"{row.figures[name]:g}" + (f" ± {row.spread[name]:g}" if name in row.spread else ""),
                         row.figures[name]) if name in row.figures else NOTHING for name in names]
        own = ours.get(row.method, {})
        lines.append((row.method, row.model, _number(row.parameters, ",.0f") if row.parameters else NOTHING, *printed,
                      *(_measured(name, own.get(name)) for name in here)))
    return Columns(("method", "model", "trained values", *names, *(f"here: {heading(name)}" for name in here)),
                   tuple(lines), texts=2)


def grid_columns(grid: Grid) -> Columns:
    """A published sweep."""
    return Columns(("", *grid.columns), tuple((name, *(_number(value, "g") for value in values))
                                              for name, values in grid.rows.items()))


def _arm(row: Row) -> str:
    return f"{row.arm} ({len(row.failed)} of {len(row.failed) + len(row.seeds)} seeds failed)" \
        if row.failed and row.seeds else row.arm


def _size(row: Row) -> Entry:
    return _number(row.size, ",d") if row.size else Entry("all", math.inf)


def _figure(row: Row, name: str) -> Entry:
    if row.figures:
        return _measured(name, row.figures.get(name))
    return Entry("n/a" if row.not_applicable else "failed", -math.inf)


def _measured(name: str, value: Measured | None) -> Entry:
    return NOTHING if value is None else Entry(shown(name, value), value.mean)


def _costs(row: Row) -> list[Entry]:
    if not row.seeds:
        return [NOTHING] * 5
    mark = " *" if row.together > 1 else ""
    return [_number(row.parameters, ",d"), _number(100 * row.share, ".3g"), _number(row.bytes / 2**20, ",.2f"),
            _number(row.peak_memory / 2**20, ",.0f", mark), _number(row.step_seconds, ".2g", mark)]


def _number(value: float, form: str, mark: str = "") -> Entry:
    return Entry(format(value, form) + mark, value)
