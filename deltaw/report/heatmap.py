"""A matrix of numbers as a picture: an SVG with axes around a PNG of one pixel a value, so that 64 × 64 stays small."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence

from deltaw.report.page import escape

_ANCHORS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""Dark violet to light yellow, evenly spaced: its lightness grows with the value, so that it survives a grey print."""
_LEFT, _TOP, _SIZE, _BOTTOM = 46, 26, 190, 40
_NUMBERED = 8
"""Up to this many rows and columns the values are written into the picture."""


def heat_map(values: Sequence[Sequence[float]], *, title: str, x_label: str, y_label: str, low: float = 0.0,
             high: float = 1.0) -> str:
    """An <svg> of the matrix, its first row on top, coloured from `low` to `high`; rows and columns count from 1."""
    rows, columns = len(values), len(values[0])
    scaled = [[min(1.0, max(0.0, (value - low) / (high - low))) for value in row] for row in values]
    width, height = _LEFT + _SIZE + 12, _TOP + _SIZE + _BOTTOM
    flat = [value for row in values for value in row]
    said = f"{title}: {rows} by {columns} values from {min(flat):.2f} to {max(flat):.2f}, the first {values[0][0]:.2f}"
    parts = [f'<svg class="map" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(said)}">',
             f'<text class="name" x="{_LEFT}" y="16">{escape(title)}</text>',
             f'<image x="{_LEFT}" y="{_TOP}" width="{_SIZE}" height="{_SIZE}" preserveAspectRatio="none" '
             f'href="data:image/png;base64,{base64.b64encode(_png(scaled)).decode()}"/>']
    for i in _marked(rows):
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{_TOP + (i - 0.5) * _SIZE / rows + 4:.1f}" '
                     f'text-anchor="end">{i}</text>')
    for j in _marked(columns):
        parts.append(f'<text class="tick" x="{_LEFT + (j - 0.5) * _SIZE / columns:.1f}" y="{_TOP + _SIZE + 15}" '
                     f'text-anchor="middle">{j}</text>')
    middle = _TOP + _SIZE / 2
    parts += [f'<text class="tick" x="{_LEFT + _SIZE / 2}" y="{height - 6}" text-anchor="middle">'
              f'{escape(x_label)}</text>',
              f'<text class="tick" transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">'
              f'{escape(y_label)}</text>']
    if max(rows, columns) <= _NUMBERED:
        parts += _numbers(values, scaled)
    return "\n".join([*parts, "</svg>"])


def colour_scale(low: float = 0.0, high: float = 1.0, *, label: str) -> str:
    """The colours of a heat map with the values they stand for; one serves a whole row of maps."""
    strip = base64.b64encode(_png([[i / 63 for i in range(64)]])).decode()
    return (f'<svg class="scale" viewBox="0 0 300 18" role="img" aria-label="{escape(label)} from {low:g} to {high:g}">'
            f'<text class="tick" x="0" y="13">{escape(label)}</text>'
            f'<text class="tick" x="150" y="13" text-anchor="end">{low:g}</text>'
            f'<image x="156" y="2" width="120" height="14" preserveAspectRatio="none" '
            f'href="data:image/png;base64,{strip}"/><text class="tick" x="282" y="13">{high:g}</text></svg>')


def _numbers(values: Sequence[Sequence[float]], scaled: Sequence[Sequence[float]]) -> list[str]:
    rows, columns = len(values), len(values[0])
    return [f'<text x="{_LEFT + (j + 0.5) * _SIZE / columns:.1f}" y="{_TOP + (i + 0.5) * _SIZE / rows + 4:.1f}" '
            f'text-anchor="middle" class="{"ondark" if scaled[i][j] < 0.6 else "onlight"}">{values[i][j]:.2f}</text>'
            for i in range(rows) for j in range(columns)]


def _marked(count: int) -> list[int]:
    """Which rows or columns get a number: all of a few, else the first, some round ones and the last."""
    if count <= _NUMBERED:
        return list(range(1, count + 1))
    step = next(s for s in (2, 5, 10, 20, 50, 100, 200, 500, 1000, 10**9) if count / s <= 5)
    return sorted({1, *(n for n in range(step, count, step) if count - n > step / 2), count})


def _png(rows: Sequence[Sequence[float]]) -> bytes:
    """A PNG of these values from 0 to 1, one pixel each, in colours from a table of 256."""
    table = b"".join(bytes(_colour(i / 255)) for i in range(256))
    pixels = b"".join(b"\0" + bytes(round(255 * value) for value in row) for row in rows)
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 3, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"PLTE", table), (b"IDAT", zlib.compress(pixels, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(data)) + kind + data
                                           + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)


def _colour(value: float) -> tuple[int, int, int]:
    """The colour of a value from 0 to 1."""
    place = value * (len(_ANCHORS) - 1)
    low = min(int(place), len(_ANCHORS) - 2)
    red, green, blue = (round(a + (b - a) * (place - low)) for a, b in zip(_ANCHORS[low], _ANCHORS[low + 1],
                                                                           strict=True))
    return red, green, blue
