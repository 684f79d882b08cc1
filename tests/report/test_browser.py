"""The analysis page in a real browser: no errors, no requests, sorting works, it fits its window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deltaw.analyse import analyse
from deltaw.report import analysis_page, write_page
from deltaw.train.forgetting import Forgetting
from tests.analyse.changes import adapter


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Any:
    found = analyse({"r=2": adapter(2), "r=10": adapter(10, seed=1)})
    probed = [Forgetting(adapter="r=2", before=3.0, after=3.5, tokens=100)]
    browser.get(write_page(analysis_page(found, probed, "text"), tmp_path / "page.html").as_uri())
    return browser


def test_it_runs_without_errors_and_fetches_nothing(opened: Any) -> None:
    assert opened.get_log("browser") == []
    assert opened.execute_script("return performance.getEntriesByType('resource').filter(e => !e.name.startsWith("
                                 "'data:')).length") == 0
    broken = "return [...document.querySelectorAll('svg image')].filter(i => i.getBBox().width < 50).length"
    assert opened.execute_script(broken) == 0
    assert opened.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


def test_a_click_sorts_and_another_turns_it_round(opened: Any) -> None:
    column = ("return [...document.querySelector('table.sortable').tBodies[0].rows]"
              ".map(row => row.cells[arguments[0]].innerText)")
    parameters = opened.find_elements("css selector", "table.sortable thead button")[4]
    assert parameters.text == "parameters"
    parameters.click()
    assert opened.execute_script(column, 0) == ["r=10", "r=2"]  # figures start with the largest
    assert parameters.find_element("xpath", "..").get_attribute("aria-sort") == "descending"
    parameters.click()
    assert opened.execute_script(column, 0) == ["r=2", "r=10"]
    by_name = opened.find_elements("css selector", "table.sortable thead button")[0]
    by_name.click()
    assert opened.execute_script(column, 0) == ["r=2", "r=10"]  # 2 before 10, as people count
    assert parameters.find_element("xpath", "..").get_attribute("aria-sort") == "none"
