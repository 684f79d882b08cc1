"""The page of a study: figures in the units of the papers, the paper's rows beside them, nothing silently left out."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

from deltaw.compare import StudyResult
from deltaw.compare.advice import advise
from deltaw.compare.noise import measured
from deltaw.compare.table import Row
from deltaw.report.chart import Line, line_chart
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


def test_what_has_no_figure_stands_in_the_table_and_is_listed_with_its_reason() -> None:
    text = page(row("lora", 0.9, 0.91), row("bitfit", not_applicable="the model has no biases"),
                row("full", 0.8, failed={1: "loss is NaN"}), row("head", failed={0: "gone"}))
    (results,) = [part for part in text.split("<section>") if "<h2>Results</h2>" in part]
    assert 'full (1 of 2 seeds failed)</th>' in results
    assert [results.count(f">{mark}</td>") for mark in ("n/a", "failed")] == [2, 2]
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


def test_a_budget_gives_one_table_in_the_form_of_table_5() -> None:
    arms = {"q_proj": 8, "v_proj": 9, "q_proj+v_proj": 4}
    rows = tuple(row(f"{name} r={rank}", 0.5 + rank / 100, 0.5 + rank / 100) for name, rank in arms.items())
    config = {"train": {"model": "m", "data": "d"}, "budget": 4000, "targets": tuple(arms), "paper": "wikisql"}
    text = study_page(StudyResult(kind="sweep", folder="s", config=config, judged_by="accuracy", rows=rows, curves={},
                                  ranks={f"{name} r={rank}": (name, rank) for name, rank in arms.items()}))
    assert "By rank" not in text
    part = text[text.index("At equal size"):text.index("The paper&#x27;s rows")]
    part = part.replace("<wbr/>", "")
    heads = [f">{name}, r={rank}</th>" for name, rank in arms.items()]
    assert [part.count(head) for head in heads] == [1, 1, 1]
    assert part.index(heads[0]) < part.index(heads[1]) < part.index(heads[2])
    assert [part.count(said) for said in ("58 ± 0", ">59 ± 0<", "54 ± 0", "–")] == [1, 1, 1, 0]
    assert "LoRA paper, Table 5" in text
    assert "LoRA paper, Table 6" in text


def test_long_names_are_not_cut_off() -> None:
    names = [f"q_proj+k_proj+v_proj+o_proj rate={n} rank-stabilised" for n in range(6)]
    lines = [Line(name, [(0.0, 2.0), (5.0, 1.5)], "s1") for name in names]
    svg = ElementTree.fromstring(line_chart(lines, x_label="step", y_label="loss", from_zero=False))
    width, height = (float(side) for side in svg.attrib["viewBox"].split()[2:])
    legend = svg.findall("text[@class='legend']")
    assert [text.text for text in legend] == names
    assert all(float(text.attrib["x"]) + 6.8 * len(text.text or "") <= width for text in legend)
    tops = [float(y) for line in svg.findall("polyline") for y in line.attrib["points"].replace(",", " ").split()[1::2]]
    assert max(float(text.attrib["y"]) for text in legend) < min(tops)
    assert max(tops) < height
    ticks = [text.text for text in svg.findall("text[@class='tick']") if text.attrib["text-anchor"] == "end"][:-1]
    assert (ticks[0], ticks[-1]) == ("1.5", "2")  # fitted to the losses, not from 0
    svg = ElementTree.fromstring(dot_chart({name: measured([1.0]) for name in [*names, "x" * 90]}, x_label="loss"))
    labels = svg.findall("text[@class='legend']")
    assert all(float(text.attrib["x"]) - 6.8 * len(text.text or "") >= 0 for text in labels)
    assert "…" in (labels[-1].text or "")
