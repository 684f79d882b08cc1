"""A study's runs: done once, told apart, resumed; what fails is a row that says so."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from deltaw.compare import study
from deltaw.compare.run import OUTCOME, SPEC, Outcome, Run, prepared, read_outcome, slug, write_outcome
from deltaw.compare.study import run_study
from deltaw.compare.table import rows_of

RUNS = [Run(arm=arm, seed=seed, train={"model": "m", "learning_rate": 1e-3}) for arm in ("lora", "full", "bitfit")
        for seed in (0, 1)]


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The runs that were really executed; "full" fails with seed 1, "bitfit" never applies."""
    done: list[tuple[str, int]] = []

    def execute(folder: Path, run: Run) -> Outcome:
        done.append((run.arm, run.seed))
        outcome = Outcome(identity=run.identity, status="done", figures={"loss": 1.0 + run.seed}, parameters=10,
                          base_parameters=1000)
        if run.arm == "bitfit":
            outcome = Outcome(identity=run.identity, status="n/a", reason="the model has no biases")
        elif (run.arm, run.seed) == ("full", 1):
            outcome = Outcome(identity=run.identity, status="failed", reason="loss is NaN")
        (folder / run.place).mkdir(parents=True, exist_ok=True)
        write_outcome(folder / run.place, outcome)
        return outcome

    monkeypatch.setattr(study, "execute", execute)
    return done


def test_what_is_done_is_read_and_what_failed_is_tried_again(tmp_path: Path, executed: list[tuple[str, int]]) -> None:
    first = run_study(tmp_path, RUNS, lambda _: None)
    assert executed == [("lora", 0), ("lora", 1), ("full", 0), ("full", 1), ("bitfit", 0)]
    executed.clear()
    assert run_study(tmp_path, RUNS, lambda _: None, unsuited={"bitfit": "the model has no biases"}) == first
    assert executed == [("full", 1)]


def test_what_did_not_apply_once_is_tried_again_where_nothing_speaks_against_it(
        tmp_path: Path, executed: list[tuple[str, int]]) -> None:
    """As of a study whose base was not there at first; it does not stand in the way of seeds that are done."""
    lost = Outcome(identity=RUNS[0].identity, status="n/a", reason="the base is not there")
    write_outcome(prepared(tmp_path, RUNS[0]), lost)
    run_study(tmp_path, RUNS[1:2], lambda _: None)
    assert [outcome.status for outcome in run_study(tmp_path, RUNS[:2], lambda _: None)] == ["done", "done"]
    assert executed == [("lora", 1), ("lora", 0)]


def test_another_option_is_another_run(tmp_path: Path, executed: list[tuple[str, int]]) -> None:
    run_study(tmp_path, RUNS[:1], lambda _: None)
    changed = dataclasses.replace(RUNS[0], train={"model": "m", "learning_rate": 2e-3})
    assert read_outcome(tmp_path, changed) is None
    run_study(tmp_path, [changed], lambda _: None)
    assert executed == [("lora", 0), ("lora", 0)]


def test_a_study_from_before_there_was_an_option_goes_on(tmp_path: Path) -> None:
    """An option that came later leaves a run what it was, as long as it is left at its default."""
    before = Run(arm="lora", seed=0, train={"model": "m", "learning_rate": 1e-3})
    place = prepared(tmp_path, before)
    write_outcome(place, Outcome(identity=before.identity, status="done", figures={"loss": 1.0}))
    now = dataclasses.replace(before, train={**before.train, "doctor_steps": 3})
    assert read_outcome(tmp_path, now) == read_outcome(tmp_path, before)
    assert prepared(tmp_path, now) == place
    assert (place / OUTCOME).is_file()
    for other in ({"doctor_steps": 4}, {"doctor_steps": 3, "learning_rate": 2e-3}, {"unheard_of": None}):
        assert read_outcome(tmp_path, dataclasses.replace(before, train={**before.train, **other})) is None
    prepared(tmp_path, dataclasses.replace(before, train={**before.train, "doctor_steps": 4}))
    assert not (place / OUTCOME).exists()


def test_what_was_trained_stays_where_only_the_judging_is_another(tmp_path: Path) -> None:
    run = Run(arm="lora", seed=0, train={"model": "m", "metrics": [], "max_new_tokens": 64, "keep_best": "loss"})
    tensors = prepared(tmp_path, run) / "adapter" / "adapter_model.safetensors"
    write_outcome(tmp_path / run.place, Outcome(identity=run.identity, status="done"))

    def keeps(before: Run, **changes: object) -> bool:
        prepared(tmp_path, before)
        tensors.parent.mkdir(exist_ok=True)
        tensors.touch()
        place = prepared(tmp_path, now := dataclasses.replace(before, **changes))
        assert read_outcome(tmp_path, now) is None
        assert json.loads((place / SPEC).read_text(encoding="utf-8"))["identity"] == now.identity
        return tensors.exists()

    judging = {"test": "t", "test_rows": 5, "beams": {"num_beams": 4}, "latency": True}
    assert all(keeps(run, **{name: value}) for name, value in judging.items())
    assert keeps(run, train={**run.train, "metrics": ["bleu"], "max_new_tokens": 9})
    assert not keeps(run, train={**run.train, "learning_rate": 1.0})
    assert not keeps(run, train={**run.train, "keep_best": "bleu", "metrics": ["bleu"]})
    chosen = dataclasses.replace(run, train={**run.train, "keep_best": "bleu", "metrics": ["bleu"]})
    assert keeps(chosen, train={**chosen.train, "metrics": ["bleu", "nist"]})
    assert not keeps(chosen, train={**chosen.train, "max_new_tokens": 9})


@pytest.mark.parametrize("text", ["[]", "null", '{"identity": "x"}', '{"identity": "x", "curve": [[1, 2, 3]]}', ""])
def test_files_of_another_version_are_no_outcome_and_no_run(tmp_path: Path, text: str) -> None:
    place = prepared(tmp_path, RUNS[0])
    (place / OUTCOME).write_text(text, encoding="utf-8")
    assert read_outcome(tmp_path, RUNS[0]) is None
    (place / SPEC).write_text(text, encoding="utf-8")
    assert read_outcome(tmp_path, RUNS[0]) is None
    assert json.loads((prepared(tmp_path, RUNS[0]) / SPEC).read_text(encoding="utf-8"))["arm"] == "lora"


def test_a_damaged_outcome_is_no_outcome(tmp_path: Path, executed: list[tuple[str, int]]) -> None:
    run_study(tmp_path, RUNS[:1], lambda _: None)
    (tmp_path / RUNS[0].place / OUTCOME).write_text('{"identity": "half', encoding="utf-8")
    assert read_outcome(tmp_path, RUNS[0]) is None


def test_rows_show_means_failures_and_what_does_not_apply(tmp_path: Path, executed: list[tuple[str, int]]) -> None:
    lora, full, bitfit = rows_of(RUNS, run_study(tmp_path, RUNS, lambda _: None))
    assert (lora.figures["loss"].mean, lora.seeds, lora.share) == (1.5, (0, 1), 0.01)
    assert (full.seeds, dict(full.failed)) == ((0,), {1: "loss is NaN"})
    assert (bitfit.figures, bitfit.not_applicable) == ({}, "the model has no biases")


def test_labels_become_folders_that_stay_apart() -> None:
    assert slug("adapter-h") == "adapter-h"
    names = {slug("q+v r=4"), slug("q+v/r=4"), slug("../r=4"), slug("r=4")}
    assert len(names) == 4
    assert all("/" not in name and not name.startswith(".") for name in names)


def test_a_process_that_dies_is_a_failed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study.sys, "executable", "/bin/false")
    outcome = study.execute(tmp_path, RUNS[0])
    assert outcome.status == "failed"
    assert "ended with 1" in outcome.reason
    assert read_outcome(tmp_path, RUNS[0]) == outcome
