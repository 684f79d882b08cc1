"""The one table of a study: what stands in it of every arm, and the paper's rows beside."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from deltaw.compare.columns import NOTHING, Entry, published_columns, study_columns
from deltaw.compare.noise import measured
from deltaw.compare.published import SWEEPS, TABLES
from deltaw.compare.run import Outcome, Run
from deltaw.compare.table import Row, rows_of

TIMES = {"base_1": 0.01, "tuned_1": 0.012, "merged_1": 0.01, "base_16": 0.1, "tuned_16": 0.11, "merged_16": 0.1}


def row(arm: str, *values: float, **changes: object) -> Row:
    figures = {"accuracy": measured(values)} if values else {}
    return Row(arm=arm, figures=figures, seeds=tuple(range(len(values))), **changes)  # type: ignore[arg-type]


def cells(rows: list[Row]) -> dict[str, dict[str, str]]:
    """Texts by arm and heading."""
    found = study_columns(rows, "accuracy")
    return {str(line[0]): dict(zip(found.headings[1:], [c.text for c in line[1:] if isinstance(c, Entry)], strict=True))
            for line in found.rows}


def test_latency_stands_in_the_table_where_it_was_measured() -> None:
    unmerged = {"tuned_1": 0.01, "tuned_16": 0.1}
    rows = [row("lora", 0.9, latency=TIMES), row("full", 0.8, latency=unmerged), row("x", 0.7)]
    found = cells(rows)
    names = ("1 row, ms", "1 row merged, ms", "16 rows, ms", "16 rows merged, ms")
    assert [[found[arm][name] for name in names] for arm in ("lora", "full", "x")] == [
        ["12", "10", "110", "100"], ["10", "–", "100", "–"], ["–"] * 4]
    assert "1 row, ms" not in study_columns(rows[2:], "accuracy").headings


def test_what_failed_or_does_not_apply_is_a_line_with_a_mark() -> None:
    found = cells([row("lora", 0.9, failed={1: "NaN", 2: "NaN"}), row("bitfit", not_applicable="no biases"),
                   row("full", failed={0: "killed"})])
    assert list(found) == ["lora (2 of 3 seeds failed)", "bitfit", "full"]
    assert [of["accuracy, %"] for of in found.values()] == ["90", "n/a", "failed"]
    assert [of["seeds"] for of in found.values()] == ["1", "–", "–"]
    assert cells([row("bitfit", not_applicable="no biases")])["bitfit"]["accuracy, %"] == "n/a"  # no figure at all


def test_figures_of_a_shared_process_are_marked_and_only_those() -> None:
    found = study_columns([row("a", 0.9, together=3, peak_memory=2**20, step_seconds=0.5), row("b", 0.9)], "accuracy")
    marked = [[name for name, cell in zip(found.headings, line, strict=True) if isinstance(cell, Entry)
               and cell.text.endswith("*")] for line in found.rows]
    assert marked == [["peak memory, MiB", "step, s"], []]
    assert found.notes[0].startswith("* of runs that trained in one process")


def test_a_classifiers_head_is_left_out_as_in_the_papers_and_said() -> None:
    """Base and head of 1,000 and 30 values: full trains both, BitFit 20 and the head, a subspace d of all."""
    outcomes = {"full": 1030, "bitfit": 50, "head": 30, "subspace": 7}
    runs = [Run(arm=arm, seed=0, train={"method": arm}) for arm in outcomes]
    done = [Outcome(identity="", status="done", parameters=count, base_parameters=1030, figures={"accuracy": 0.9})
            for count in outcomes.values()]
    rows = rows_of(runs, done, 1000)
    assert [(r.parameters, r.head, r.share) for r in rows] == [(1000, 30, 1.0), (20, 30, 0.02), (0, 30, 0.0),
                                                               (7, 0, 0.007)]
    assert any("classifier's new head, as papers do: 30 values more" in note
               for note in study_columns(rows, "accuracy").notes)
    assert [(r.parameters, r.head) for r in rows_of(runs, done)] == [(count, 0) for count in outcomes.values()]


def test_a_row_survives_its_file() -> None:
    one = dataclasses.replace(row("lora", 0.5, 0.7, failed={2: "x"}, latency=TIMES), size=10)
    values = json.loads(json.dumps(one.to_dict()))
    assert Row.from_dict(values) == one
    del values["head"]
    assert Row.from_dict(values | {"gone": 1}) == one


def test_every_figure_that_both_have_stands_beside_the_papers() -> None:
    ours = [Row(arm="lora", seeds=(0,), figures={"loss": measured([1.0]), "bleu": measured([42.0]),
                                                 "meteor_exact_stem": measured([0.58]), "rougeL": measured([0.57])}),
            Row(arm="full", seeds=(0,), figures={"bleu": measured([45.0])})]
    found = published_columns(TABLES["e2e"], ours)
    here = [name for name in found.headings if name.startswith("here")]
    assert here == ["here: bleu", "here: meteor_exact_stem, %", "here: rougeL, %"]
    by_model = {(line[0], line[1]): line[-3:] for line in found.rows}
    assert [cell.text for cell in by_model["lora", "GPT-2 L"] if isinstance(cell, Entry)] == ["42", "58", "57"]
    assert by_model["full", "GPT-2 M"][1:] == (NOTHING, NOTHING)
    assert by_model["adapter-h", "GPT-2 M"] == (NOTHING,) * 3
    assert "here" not in " ".join(published_columns(TABLES["e2e"]).headings)


@pytest.mark.parametrize(("table", "model", "rows"), [("e2e", "GPT-2 L", 5), ("sst2", "DeBERTa XXL", 2),
                                                      ("sst2", "RoBERTa large †", 5), ("sst2", "RoBERTa large", 2)])
def test_the_papers_rows_are_all_there(table: str, model: str, rows: int) -> None:
    assert sum(row.model == model for row in TABLES[table].rows) == rows


def test_published_sweeps_are_rectangles() -> None:
    for grids in SWEEPS.values():
        for grid in grids:
            assert all(len(values) == len(grid.columns) for values in grid.rows.values()), grid.title
    # Table 6: over WikiSQL's ranks of Wq and Wv there is less than a point, and r=4 is Table 5's 73.7.
    table_5, table_6 = SWEEPS["wikisql"]
    assert table_6.rows["Wq,Wv"][2] == table_5.rows["WikiSQL"][5] == 73.7
    assert math.isclose(max(table_6.rows["Wq,Wv"]) - min(table_6.rows["Wq,Wv"]), 0.5)
