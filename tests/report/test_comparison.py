"""The page of a study: figures in the units of the papers, the paper's rows beside them, nothing silently left out."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

from deltaw.compare import StudyResult
from deltaw.compare.advice import advise
from deltaw.compare.noise import measured
from deltaw.compare.table import Row
from deltaw.report.comparison import study_page
from deltaw.report.dots import dot_chart


def row(arm: str, *values: float, size: int | None = None, **changes: Any) -> Row:
    figures = {"loss": measured([1 - value for value in values]), "accuracy": measured(values)} if values else {}
    return Row(arm=arm, size=size, figures=figures, parameters=1000 * len(arm), seeds=tuple(range(len(values))),
               **changes)


def page(*rows: Row, **config: Any) -> str:
    config = {"train": {"model": "m", "data": "d"}, "paper": None, **config}
    return study_page(StudyResult(kind="compare", folder="studies/mine", config=config, judged_by="accuracy", rows=rows,
                                  curves={}, advice=advise(rows, "accuracy")))


def test_shares_stand_in_per_cent_beside_the_papers() -> None:
    text = page(row("lora", 0.90, 0.92), row("full", 0.80, 0.81), paper="sst2")
    assert "accuracy, %" in text
    assert "91 ± 1.4" in text
    assert "here: accuracy, %" in text
    assert "95.1 ± 0.2" in text  # Table 2
    assert 'data-value="0.91"' in text  # sorts by the value


def test_what_has_no_figure_is_listed_with_its_reason() -> None:
    text = page(row("lora", 0.9, 0.91), row("bitfit", not_applicable="the model has no biases"),
                row("full", 0.8, failed={1: "loss is NaN"}))
    for expected in ("does not apply", "the model has no biases", "seed 1 failed", "loss is NaN"):
        assert expected in text


def test_sizes_stand_side_by_side_with_all_examples_last() -> None:
    text = page(row("lora", 0.9), row("lora", 0.5, size=100), row("lora", 0.7, size=1000))
    assert text.index(">100</th>") < text.index(">1,000</th>") < text.index(">all</th>")
    assert "Table 16" in text


def test_dots_stand_at_the_mean_with_a_line_of_the_spread() -> None:
    svg = ElementTree.fromstring(dot_chart({"a": measured([0.0, 10.0]), "b": measured([5.0])}, x_label="accuracy, %"))
    (one, other) = svg.findall("circle")
    assert one.attrib["cx"] == other.attrib["cx"]  # both at 5
    spread, none = svg.findall("line[@class='s1']")
    ends = [float(spread.attrib[name]) for name in ("x1", "x2")]
    assert abs(sum(ends) / 2 - float(one.attrib["cx"])) < 0.2
    assert none.attrib["x1"] == none.attrib["x2"]
    assert {"a", "b", "accuracy, %"} <= {text.text for text in svg.iter("text")}
    assert dot_chart({"a": measured([1.0])}, x_label="x") == ""


def test_ranks_of_a_sweep_stand_side_by_side() -> None:
    rows = tuple(row(arm, value, value) for arm, value in (("q r=1", 0.5), ("q r=64", 0.6), ("q+v r=1", 0.7)))
    ranks = {"q r=1": ("q", 1), "q r=64": ("q", 64), "q+v r=1": ("q+v", 1)}
    text = study_page(StudyResult(kind="sweep", folder="s", config={"train": {"model": "m", "data": "d"}}, ranks=ranks,
                                  judged_by="accuracy", rows=rows, curves={}))
    part = text[text.index("By rank"):]
    assert part.index("r = 1<") < part.index("r = 64<")
    cells = part[part.index("<tbody>"):part.index("</tbody>")]
    assert [cells.count(said) for said in ("50 ± 0", "60 ± 0", "70 ± 0", "–")] == [1, 1, 1, 1]
