"""The page needs nothing but itself, says what the run says, and takes hostile texts for what they are."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from deltaw.errors import TrainingError
from deltaw.report import report_page, write_report
from deltaw.report.chart import Line, line_chart, smoothed
from deltaw.train.result import Answer, SiteRow, TrainResult

HOSTILE = '<script>alert("x")</script><img src=https://evil.example/a.png>'


def result(**changes: Any) -> TrainResult:
    curve = [{"event": "step", "step": i, "loss": 4.0 / i} for i in range(1, 61)]
    curve += [{"event": "eval", "step": i, "loss": 5.0 / (i + 1)} for i in (0, 20, 40, 60)]
    values: dict[str, Any] = {
        "adapter": "runs/mood", "base": "owner/model", "config": {"r": 8, "note": HOSTILE}, "steps": 60,
        "planned_steps": 60, "best_step": 40, "before": {"loss": 4.15, "exact_match": 0.0},
        "after": {"loss": 0.14, "exact_match": 0.9},
        "answers": (Answer(f"Is it good?\n{HOSTILE}", "yes", "hm", "yes"),),
        "curve": tuple(curve), "sites": (SiteRow("model.layers.0.q_proj", "linear", (576, 576), 8, 9216),),
        "checks": {"base": "all 272 tensors have the bits they had before"},
        "data": {"valid_rows": 30, "source": HOSTILE},
        "trained_parameters": 9216, "base_parameters": 134_515_008, "adapter_bytes": 40_000, "tokens": 1000,
        "train_seconds": 10.0, "total_seconds": 12.0, "peak_memory": 2**30, "precision": "float32: asked for",
        "versions": {"torch": "2.13.0"},
    }
    return TrainResult(**{**values, **changes})


class Reader(HTMLParser):
    """Collects tags, attributes and text, and checks that tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("meta", "line", "polyline", "circle", "rect", "image"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


def test_the_page_has_one_script_of_its_own_and_nothing_from_elsewhere() -> None:
    page = read(report_page(result()))
    assert page.tags.count("script") == 1
    assert not {"link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    assert not [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "action")]
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    style = re.findall(r"<style>(.*?)</style>", report_page(result()), re.S)[0]
    assert "url(" not in style
    assert "@import" not in style


def test_texts_are_shown_and_never_run() -> None:
    assert HOSTILE not in report_page(result())
    assert read(report_page(result())).text.count("<script>alert") == 3


def test_it_says_what_the_run_says() -> None:
    text = read(report_page(result())).text
    for said in ("4.1500", "0.1400", "0.0%", "90.0%", "9,216 parameters, 0.01% of the base's 134,515,008", "576 × 576",
                 "the best at 40", "1.00 GiB", "100 tokens/s", "have the bits they had before", "torch 2.13.0",
                 "mood: an adapter of model"):
        assert said in text, said


def test_light_and_dark() -> None:
    assert "prefers-color-scheme: dark" in report_page(result())


def test_parts_without_content_are_left_out() -> None:
    text = read(report_page(result(answers=(), curve=(), checks={}, sites=()))).text
    assert "Answers" not in text
    assert "Loss" not in text
    assert "doctor" not in text


def test_the_chart_is_an_svg_with_both_curves_inside_its_frame() -> None:
    page = report_page(result())
    svg = ElementTree.fromstring(re.findall(r"<svg.*?</svg>", page, re.S)[0])
    lines = [e for e in svg.iter() if e.tag == "polyline"]
    assert [len(e.attrib["points"].split()) for e in lines] == [60, 4]
    for element in lines:
        for x, y in (map(float, point.split(",")) for point in element.attrib["points"].split()):
            assert 56 <= x <= 704
            assert 16 <= y <= 260
    held = [tuple(map(float, point.split(","))) for point in lines[1].attrib["points"].split()]
    assert [x for x, _ in held] == sorted(x for x, _ in held)
    assert [y for _, y in held] == sorted(y for _, y in held)  # a falling loss goes down the page


def test_a_chart_of_one_point_and_of_none() -> None:
    assert "circle" in line_chart([Line("a", [(3, 1.0)], "train")], x_label="x", y_label="y")
    assert line_chart([Line("a", [(1, float("nan"))], "train")], x_label="x", y_label="y") == ""


def test_smoothing_is_the_mean_of_the_last_points() -> None:
    assert smoothed([(1, 3.0), (2, 5.0), (3, 1.0)], window=2) == [(1, 3.0), (2, 4.0), (3, 3.0)]


def test_it_is_written_whole_or_refused(tmp_path: Path) -> None:
    path = write_report(result(), tmp_path / "new" / "report.html")
    assert path.read_text(encoding="utf-8") == report_page(result())
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot be written"):
        write_report(result(), tmp_path / "file" / "report.html")
