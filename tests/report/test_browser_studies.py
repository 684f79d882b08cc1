"""The pages of `compare` and `sweep` in a real browser: no errors, no requests, sorting, light and dark, the width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deltaw.compare import StudyResult
from deltaw.compare.advice import advise
from deltaw.compare.intrinsic import Intrinsic
from deltaw.compare.noise import measured
from deltaw.compare.table import Row
from deltaw.report import write_page
from deltaw.report.comparison import study_page

TABLE = """
const tables = [...document.querySelectorAll('table.sortable')];
const table = tables.find(t => t.tHead.innerText.includes('trained values') && t.tBodies[0].innerText.includes('%s'));
"""
COLUMN = "const at = [...table.tHead.rows[0].cells].findIndex(c => c.innerText.trim() === 'trained values');"
ARMS = {"compare": {"lora": 3000, "full": 900_000, "adapter-h": 12_000}, "sweep": {"r=1": 1000, "r=8": 8000,
                                                                                   "r=64": 64_000}}


def row(arm: str, parameters: int, *values: float, **more: Any) -> Row:
    figures = {"loss": measured([1 - value for value in values]), "accuracy": measured(values)}
    return Row(arm=arm, figures=figures, parameters=parameters, share=parameters / 1e6, bytes=4 * parameters,
               peak_memory=2**30, step_seconds=0.5, seeds=tuple(range(len(values))), **more)


def study(kind: str) -> StudyResult:
    latency = {"base_1": 0.01, "tuned_1": 0.012, "merged_1": 0.01, "base_16": 0.1, "tuned_16": 0.11, "merged_16": 0.1}
    rows = [row(arm, count, 0.8 + 0.01 * i, 0.82 + 0.01 * i, latency=latency)
            for i, (arm, count) in enumerate(ARMS[kind].items())]
    config = {"train": {"model": "my/base", "data": "rows.jsonl"}, "paper": "sst2" if kind == "compare" else None}
    curves = {arm: [(step, 1 / (1 + step + i)) for step in range(0, 50, 10)] for i, arm in enumerate(ARMS[kind])}
    more: dict[str, Any]
    if kind == "sweep":
        more = {"ranks": {arm: ("q_proj", int(arm[2:])) for arm in ARMS[kind]}, "dropped": ("r=2",)}
    else:
        rows.append(Row(arm="bitfit", not_applicable="the model has no <bias> vectors"))
        more = {"intrinsic": (Intrinsic(measure="DID", d90=800, target=0.72, full=0.8,
                                        curve=((100, 0.5), (800, 0.73), (3200, 0.78))),)}
    return StudyResult(kind=kind, folder="studies/mine", config=config, judged_by="accuracy", rows=tuple(rows),
                       curves=curves, advice=advise(rows, "accuracy"), **more)


@pytest.fixture(params=["compare", "sweep"])
def opened(request: pytest.FixtureRequest, browser: Any, tmp_path: Path) -> tuple[Any, str]:
    page = write_page(study_page(study(request.param)), tmp_path / "page.html")
    browser.get(page.as_uri())
    return browser, request.param


def test_it_runs_without_errors_and_fetches_nothing(opened: tuple[Any, str]) -> None:
    browser, kind = opened
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').filter(e => !e.name.startsWith("
                                  "'data:')).length") == 0
    outside = ("return [...document.querySelectorAll('[src], link[href], image')].map(e => e.src || e.href?.baseVal "
               "|| e.href).filter(a => a && !a.startsWith('data:')).length")
    assert browser.execute_script(outside) == 0
    text = browser.find_element("tag name", "body").text
    for arm in ARMS[kind]:
        assert arm in text
    if kind == "compare":
        assert "the model has no <bias> vectors" in text


def test_charts_are_drawn_and_nothing_is_wider_than_the_window(opened: tuple[Any, str]) -> None:
    browser, _ = opened
    sizes = browser.execute_script("return [...document.querySelectorAll('figure svg')].map(s => {const b = "
                                   "s.getBoundingClientRect(); return [b.width, b.height]})")
    assert sizes
    assert all(width > 100 and height > 40 for width, height in sizes)
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


def test_a_click_sorts_by_the_value_and_another_turns_it_round(opened: tuple[Any, str]) -> None:
    browser, kind = opened
    find = TABLE % next(iter(ARMS[kind]))
    click = find + COLUMN + "table.tHead.rows[0].cells[at].querySelector('button').click();"
    first = find + "return [...table.tBodies[0].rows].map(row => row.cells[0].innerText.trim())"
    by_count = sorted(ARMS[kind], key=lambda arm: ARMS[kind][arm])
    for expected in (by_count[::-1], by_count):
        browser.execute_script(click)
        arms = [arm for arm in browser.execute_script(first) if arm in ARMS[kind]]  # others have nothing to sort by
        assert arms == expected


def test_it_follows_the_readers_scheme_and_stays_readable(opened: tuple[Any, str]) -> None:
    browser, _ = opened
    seen = {}
    ask = ("const s = getComputedStyle(document.body), top = getComputedStyle(document.documentElement);"
           "return [[s.backgroundColor, top.backgroundColor, 'rgb(255, 255, 255)']"
           ".find(c => c !== 'rgba(0, 0, 0, 0)'), s.color]")
    for scheme in ("light", "dark"):
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia",
                                {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        seen[scheme] = [luminance(colour) for colour in browser.execute_script(ask)]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert seen["light"][0] > 0.5 > seen["dark"][0]
    for behind, ink in seen.values():  # WCAG's contrast of text
        assert (max(behind, ink) + 0.05) / (min(behind, ink) + 0.05) > 7


def luminance(colour: str) -> float:
    """Of "rgb(r, g, b)", 0 to 1, as WCAG 2 defines it."""
    parts = [int(part) / 255 for part in colour[colour.index("(") + 1:-1].split(",")[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
