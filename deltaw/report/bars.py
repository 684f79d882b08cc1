"""Bars beside names: what shares something out, for one series or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deltaw.report.page import escape

_WIDTH, _NAMES, _VALUES, _BAR, _GAP, _LEGEND = 720, 170, 70, 13, 9, 26


def bar_chart(rows: Mapping[str, Sequence[float]], series: Sequence[str], *, label: str, form: str = ".0%") -> str:
    """An <svg> with one bar for each name and series, from 0 to the largest value; nothing where there are no rows."""
    if not rows:
        return ""
    largest = max((value for values in rows.values() for value in values), default=0.0) or 1.0
    room = _WIDTH - _NAMES - _VALUES
    height = _LEGEND + len(rows) * (_BAR * len(series) + _GAP)
    parts = [f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(label)}">', *_legend(series)]
    y = _LEGEND
    for name, values in rows.items():
        middle = y + _BAR * len(series) / 2 + 4
        parts.append(f'<text class="legend" x="{_NAMES - 10}" y="{middle}" text-anchor="end">{escape(name)}</text>')
        for number, value in enumerate(values):
            top, length = y + number * _BAR, max(1.0, value / largest * room)
            parts += [f'<rect class="s{number % 6 + 1}" x="{_NAMES}" y="{top + 1}" width="{length:.1f}" '
                      f'height="{_BAR - 2}" rx="2"/>',
                      f'<text class="tick" x="{_NAMES + length + 6:.1f}" y="{top + _BAR - 3}">'
                      f"{format(value, form)}</text>"]
        y += _BAR * len(series) + _GAP
    return "\n".join([*parts, "</svg>"])


def _legend(series: Sequence[str]) -> list[str]:
    parts, x = [], float(_NAMES)
    for number, name in enumerate(series):
        parts.append(f'<rect class="s{number % 6 + 1}" x="{x}" y="5" width="12" height="10" rx="2"/>'
                     f'<text class="legend" x="{x + 18}" y="14">{escape(name)}</text>')
        x += 40 + 6.8 * len(name)
    return parts
