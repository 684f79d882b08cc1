"""A line chart as an SVG text: no library, no script, and colours that the page's style decides."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

Point = tuple[float, float]

_WIDTH, _HEIGHT = 720, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 32, 40
_KEY, _LEGEND_ROW, _LETTER = 28, 20, 6.8
"""In a legend: from a line to its name, from row to row, and the width of a letter."""


@dataclass(frozen=True, slots=True)
class Line:
    """One curve. `style` is a class of the page's style sheet, which gives the colour: train, held, or s1 to s6."""

    name: str
    points: Sequence[Point]
    style: str
    dots: bool = False


def line_chart(lines: Sequence[Line], *, x_label: str, y_label: str, from_zero: bool = True) -> str:
    """An <svg> with these curves, axes with round ticks and a legend; "" where there is no finite point.

    The y axis begins at 0, or fits the values where it is their differences that count.
    """
    lines = [Line(line.name, _finite(line.points), line.style, line.dots) for line in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    xs, ys = zip(*(point for line in lines for point in line.points), strict=True)
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(0.0, *ys) if from_zero else min(ys), max(ys))
    legend, below = _legend(lines)
    height = _HEIGHT + below
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-9)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def at(point: Point) -> Point:
        x = _LEFT + (point[0] - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)
        y = height - _BOTTOM - (point[1] - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)
        return round(x, 1), round(y, 1)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{html.escape(y_label)} by '
             f'{html.escape(x_label)}">']
    for tick in y_ticks:
        y = at((x_low, tick))[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        if x_low <= tick <= x_high:
            parts.append(f'<text class="tick" x="{at((tick, y_low))[0]}" y="{height - _BOTTOM + 18}" '
                         f'text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text class="tick" x="{_WIDTH - _RIGHT}" y="{height - 4}" text-anchor="end">'
                 f'{html.escape(x_label)}</text>')
    for line in lines:
        places = [at(point) for point in line.points]
        path = " ".join(f"{x},{y}" for x, y in places)
        parts.append(f'<polyline class="{line.style}" points="{path}"/>')
        if line.dots or len(places) == 1:
            parts += [f'<circle class="{line.style}" cx="{x}" cy="{y}" r="3.5"/>' for x, y in places]
    return "\n".join([*parts, *legend, "</svg>"])


def smoothed(points: Sequence[Point], *, window: int) -> list[Point]:
    """The mean over the last `window` points at each point: a training loss swings from batch to batch."""
    means = []
    for end in range(1, len(points) + 1):
        recent = points[max(0, end - window):end]
        means.append((points[end - 1][0], sum(y for _, y in recent) / len(recent)))
    return means


def _legend(lines: Sequence[Line]) -> tuple[list[str], int]:
    """The names above the plot, where no curve runs, in as many rows as they need; the height of rows beyond one."""
    parts, x, row = [], float(_LEFT), 0
    for line in lines:
        name = shortened(line.name, _WIDTH - _RIGHT - _LEFT - _KEY)
        if x > _LEFT and x + _KEY + width_of(name) > _WIDTH - _RIGHT:
            x, row = float(_LEFT), row + 1
        y = 14 + row * _LEGEND_ROW
        parts.append(f'<line class="{line.style}" x1="{x:.1f}" x2="{x + 22:.1f}" y1="{y}" y2="{y}"/>'
                     f'<text class="legend" x="{x + _KEY:.1f}" y="{y + 4}">{html.escape(name)}</text>')
        x += _KEY + 24 + width_of(name)
    return parts, row * _LEGEND_ROW


def width_of(name: str) -> float:
    """About the width of a legend's text."""
    return _LETTER * len(name)


def shortened(name: str, room: float) -> str:
    """The name, cut in its middle where it needs more room: what labels differ in often stands at their end."""
    most = int(room / _LETTER)
    return name if len(name) <= most else f"{name[:(most - 1) // 2]}…{name[len(name) - most // 2:]}"


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers 1, 2 or 5 times a power of ten apart that enclose low..high."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(first, last + 1)]
