"""A dot for each name with its spread beside it: what is measured several times, to see which differences are noise."""

from __future__ import annotations

from collections.abc import Mapping

from deltaw.compare.noise import Measured
from deltaw.report.chart import shortened, ticks, width_of
from deltaw.report.page import escape

_WIDTH, _RIGHT, _ROW, _TOP, _BOTTOM = 720, 24, 22, 8, 40
_NARROW, _WIDE, _GAP = 120, 340, 24
"""The least and the most room for names, and what is left beside them."""


def dot_chart(rows: Mapping[str, Measured], *, x_label: str) -> str:
    """An <svg> with a row for each name: a dot at the mean and a line of a standard deviation to either side.

    The axis shows the range of the values and not 0, since it is positions that are compared and not lengths. Nothing
    where there are less than two rows.
    """
    if len(rows) < 2:
        return ""
    ends = [value.mean + side * (value.sd or 0.0) for value in rows.values() for side in (-1, 1)]
    marks = ticks(min(ends), max(ends))
    low, high = marks[0], marks[-1]
    names = {name: shortened(name, _WIDE - _GAP) for name in rows}
    left = max(_NARROW, *(width_of(name) + _GAP for name in names.values()))
    height = _TOP + len(rows) * _ROW + _BOTTOM

    def at(value: float) -> float:
        return round(left + (value - low) / (high - low) * (_WIDTH - left - _RIGHT), 1)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(x_label)} of {len(rows)} arms">']
    for mark in marks:
        x, bottom = at(mark), height - _BOTTOM
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{_TOP}" y2="{bottom}"/>'
                     f'<text class="tick" x="{x}" y="{bottom + 16}" text-anchor="middle">{mark:g}</text>')
    parts.append(f'<text class="tick" x="{_WIDTH - _RIGHT}" y="{height - 4}" text-anchor="end">'
                 f"{escape(x_label)}</text>")
    for number, (name, value) in enumerate(rows.items()):
        y = _TOP + (number + 0.5) * _ROW
        spread = value.sd or 0.0
        parts.append(f'<text class="legend" x="{left - 12:.1f}" y="{y + 4}" text-anchor="end">'
                     f'{escape(names[name])}</text>'
                     f'<line class="s1" x1="{at(value.mean - spread)}" x2="{at(value.mean + spread)}" y1="{y}" '
                     f'y2="{y}"/><circle class="s1" cx="{at(value.mean)}" cy="{y}" r="4"/>')
    return "\n".join([*parts, "</svg>"])
