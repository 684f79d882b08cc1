"""A table as HTML: a caption for those who listen, figures on the right, and a click on a column's name sorts by it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deltaw.report.page import escape

_DENSE = 7
"""Columns above which a table is set smaller."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its name, and whether its cells are figures."""

    name: str
    figure: bool = False


@dataclass(frozen=True, slots=True)
class Cell:
    """A text whose place in the order is not its text's: a formatted number with its value."""

    text: str
    value: float


def table(columns: Sequence[Column], rows: Iterable[Sequence[str | Cell]], *, caption: str, sortable: bool = False,
          keep_lines: bool = False, strong_last: bool = False) -> str:
    """The table, or nothing where it has no rows.

    The first cell of a row is its heading. `keep_lines` keeps line breaks in cells; `strong_last` sets the last column
    in bold. A caption is always there; in a table under a heading of the same words it is for screen readers only.
    """
    rows = list(rows)
    if not rows:
        return ""
    marks = " ".join(name for name, on in (("sortable", sortable), ("text", keep_lines), ("strong", strong_last),
                                           ("dense", len(columns) > _DENSE)) if on)
    head = "".join(_head(column, sortable) for column in columns)
    named = f"<thead><tr>{head}</tr></thead>\n" if any(column.name for column in columns) else ""
    body = "\n".join(_row(columns, row) for row in rows)
    return (f'<div class="wide"><table{f" class={chr(34)}{marks}{chr(34)}" if marks else ""}>'
            f"<caption>{escape(caption)}</caption>\n{named}<tbody>\n{body}\n</tbody></table></div>")


def number(value: float | None, form: str = ".3g") -> str | Cell:
    """A figure as a cell that sorts by its value; a dash for None."""
    return Cell(format(value, form), value) if value is not None else Cell("–", float("-inf"))


def _head(column: Column, sortable: bool) -> str:
    kind = ' class="figure"' if column.figure else ""
    if not sortable:
        return f'<th scope="col"{kind}>{_breakable(column.name)}</th>'
    return f'<th scope="col"{kind} aria-sort="none"><button type="button">{_breakable(column.name)}</button></th>'


def _row(columns: Sequence[Column], row: Sequence[str | Cell]) -> str:
    cells = []
    for number_of, (column, cell) in enumerate(zip(columns, row, strict=True)):
        tag, scope = ("td", "") if number_of else ("th", ' scope="row"')
        kind = ' class="figure"' if column.figure else ""
        value = f' data-value="{cell.value!r}"' if isinstance(cell, Cell) else ""
        text = cell.text if isinstance(cell, Cell) else cell
        cells.append(f"<{tag}{scope}{kind}{value}>{escape(text) if number_of else _breakable(text)}</{tag}>")
    return f"<tr>{''.join(cells)}</tr>"


def _breakable(text: str) -> str:
    """A heading that may be broken where names are joined, as in q_proj+v_proj."""
    return escape(text).replace("+", "+<wbr/>")
