"""The blocks of a page: tables, bars, heat maps; as texts."""

from __future__ import annotations

import base64
import re
import struct
import zlib
from pathlib import Path
from xml.etree import ElementTree

import pytest

from deltaw.errors import ConfigError
from deltaw.report.bars import bar_chart
from deltaw.report.heatmap import colour_scale, heat_map
from deltaw.report.page import figure, finding, folded, page, section, write_page
from deltaw.report.table import Cell, Column, number, table


def test_a_table_has_headings_for_those_who_listen() -> None:
    rows = [("x", Cell("1,000", 1000.0))]
    found = ElementTree.fromstring(table((Column("a"), Column("b", True)), rows, caption="<c>", sortable=True))
    assert found.findtext(".//caption") == "<c>"
    assert [cell.get("scope") for cell in found.iter("th")] == ["col", "col", "row"]
    assert [cell.get("aria-sort") for cell in found.findall(".//thead//th")] == ["none", "none"]
    assert found.find(".//td").attrib == {"class": "figure", "data-value": "1000.0"}  # type: ignore[union-attr]
    assert table((Column("a"),), [], caption="c") == ""


def test_a_figure_that_is_not_there_sorts_last() -> None:
    assert number(None) == Cell("–", float("-inf"))
    assert number(0.1234, ".1%") == Cell("12.3%", 0.1234)


def test_the_picture_of_a_heat_map_holds_its_values() -> None:
    svg = ElementTree.fromstring(heat_map([[0.0, 1.0, 0.5], [0.25, 0.75, 2.0]], title="t", x_label="j", y_label="i"))
    image = svg.find("image")
    assert image is not None
    png = base64.b64decode(image.attrib["href"].removeprefix("data:image/png;base64,"))
    assert struct.unpack(">II", png[16:24]) == (3, 2)
    data = re.search(rb"IDAT(.*)....\x00\x00\x00\x00IEND", png, re.DOTALL)
    assert data
    rows = zlib.decompress(data[1])
    assert [list(rows[1:4]), list(rows[5:8])] == [[0, 255, 128], [64, 191, 255]]
    shown = [text.text for text in svg.iter("text")]
    assert {"0.00", "1.00", "0.75", "i", "j", "t"} <= set(shown)


def test_a_large_heat_map_stays_small_and_marks_round_numbers() -> None:
    text = heat_map([[(i * j) / 4096 for j in range(64)] for i in range(64)], title="t", x_label="j", y_label="i")
    assert len(text) < 20_000
    svg = ElementTree.fromstring(text)
    assert {"1", "20", "40", "64"} <= {t.text for t in svg.iter("text")}
    assert ElementTree.fromstring(colour_scale(label="φ")).get("aria-label") == "φ from 0 to 1"


def test_bars_are_as_long_as_their_values() -> None:
    svg = ElementTree.fromstring(bar_chart({"q": (0.5, 0.25), "v": (1.0, 0.0)}, ("a", "b"), label="l"))
    lengths = [float(bar.attrib["width"]) for bar in svg.iter("rect") if "height" in bar.attrib
               and bar.attrib["height"] == "11"]
    assert lengths[0] == pytest.approx(2 * lengths[1], rel=0.01)
    assert lengths[2] == max(lengths)
    assert bar_chart({}, ("a",), label="l") == ""


def test_parts_without_content_leave_nothing() -> None:
    assert section("a", "") == folded("a", "") == figure("", "a") == finding("") == ""
    assert "<h2>a&lt;</h2>" in section("a<", "x")
    assert "<script>alert" not in page("<script>alert(1)</script>", ["", section("b", "c")])


def test_a_page_is_written_whole_or_refused(tmp_path: Path) -> None:
    assert write_page("text", tmp_path / "new" / "a.html").read_text(encoding="utf-8") == "text"
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_page("text", tmp_path / "file" / "a.html")
