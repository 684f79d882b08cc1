"""Whole studies on a tiny base with made-up runs: what is told first, what judges, what is searched and kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deltaw.compare import compare, study, sweep
from deltaw.compare.config import CompareConfig, SweepConfig
from deltaw.compare.run import TUNED, Outcome, Run, prepared, write_outcome
from deltaw.compare.studies import so_far
from deltaw.errors import TrainingError
from deltaw.train.config import TrainConfig
from tests.cli.conftest import questions, write_base, write_rows


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("study")
    data = write_rows(folder / "rows.jsonl", questions("yes")[:4])
    return TrainConfig(model=str(write_base(folder / "base")), data=str(data), out="unused", metrics=("exact_match",),
                       max_steps=9)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Run], Mapping[str, float]]], list[Path]]:
    """Runs have the figures that a function says, and train nothing; returns the places that were executed."""
    def use(figures: Callable[[Run], Mapping[str, float]]) -> list[Path]:
        done: list[Path] = []

        def execute(folder: Path, run: Run) -> Outcome:
            place = prepared(folder, run)
            done.append(place)
            (place / TUNED / "checkpoints").mkdir(parents=True, exist_ok=True)
            (place / TUNED / "adapter_model.safetensors").touch()
            outcome = Outcome(identity=run.identity, status="done", figures=figures(run), parameters=10,
                              base_parameters=1000)
            write_outcome(place, outcome)
            return outcome

        monkeypatch.setattr(study, "execute", execute)
        return done

    return use


def loss(run: Run) -> dict[str, float]:
    return {"loss": 1.0 + run.seed}


def test_what_does_not_apply_is_told_before_the_first_run_and_not_begun(tmp_path: Path, train: TrainConfig,
                                                                        made_up: Any) -> None:
    done, lines = made_up(loss), list[str]()
    config = CompareConfig(train=replace(train, out=str(tmp_path)), methods=("full", "bitfit"), seeds=(0, 1),
                           together="off")
    found = compare(config, lines.append)
    assert lines[0].startswith("bitfit does not apply: method bitfit: LlamaForCausalLM has no bias vectors")
    assert [place.parents[1].name for place in done] == ["full", "full"]
    assert [bool(row.not_applicable) for row in found.rows] == [False, True]
    assert "has no bias vectors" in found.rows[1].not_applicable
    done.clear()
    assert compare(config, lines.append).rows == found.rows
    assert done == []


def dimension(run: Run) -> dict[str, float]:
    """Full fine-tuning is right in 80 %; a subspace in as many from 100 dimensions on, and else in half."""
    small = run.train["method"] == "subspace" and run.train["baseline"]["dimension"] < 100
    rate = 0.1 if run.train["learning_rate"] == 9.0 else 0.8
    return {"loss": 1.0, "exact_match": 0.5 if small else rate}


@pytest.mark.parametrize("arms", [{"methods": ("full",)}, {"methods": ("full",), "sizes": (2, 0)},
                                  {"methods": ("full",), "sizes": (2,)}, {"methods": ("lora",)},
                                  {"methods": ("lora",), "arms": {"full": {"method": "full", "learning_rate": 9.0}}}])
def test_the_search_for_d90_takes_the_studys_own_full_fine_tuning(tmp_path: Path, train: TrainConfig, made_up: Any,
                                                                  arms: dict[str, Any]) -> None:
    done = made_up(dimension)
    config = CompareConfig(train=replace(train, out=str(tmp_path)), seeds=(0,), together="off", intrinsic=True,
                           dimensions=(16, 1024), **arms)
    found = compare(config, lambda _: None)
    beside = [place for place in done if "intrinsic" in place.parts]
    full = 0.1 if "arms" in arms else 0.8
    assert [(one.measure, one.full) for one in found.intrinsic] == [("DID", full), ("SAID", full)]
    if full == 0.8:
        assert all(one.d90 is not None and 100 <= one.d90 <= 125 for one in found.intrinsic)
    assert {place.parent.name for place in beside} == {"all"}  # all examples, whatever sizes are compared
    known = "full" in arms["methods"] or "arms" in arms
    assert any(place.parents[1].name == "full" for place in beside) is not known
    assert len(done) == len(set(done))
    done.clear()
    assert compare(config, lambda _: None) == found
    assert done == []


def test_no_figure_of_full_fine_tuning_is_said(tmp_path: Path, train: TrainConfig, made_up: Any) -> None:
    made_up(loss)
    lines: list[str] = []
    config = CompareConfig(train=replace(train, out=str(tmp_path)), methods=("full",), seeds=(0,), intrinsic=True)
    assert compare(config, lines.append).intrinsic == ()
    assert lines[-1] == "intrinsic dimension: full fine-tuning has no figure to take 90 % of"


def meteor(run: Run) -> dict[str, float]:
    return {"loss": 1.0, "meteor_exact_stem": run.train["lora"]["r"] / 10 + run.seed / 100}


@pytest.mark.parametrize("halving", [0, 2])
def test_meteor_judges_under_the_name_that_it_has_without_wordnet(tmp_path: Path, train: TrainConfig, made_up: Any,
                                                                  halving: int) -> None:
    made_up(meteor)
    config = SweepConfig(train=replace(train, out=str(tmp_path), metrics=("meteor",)), ranks=(1, 2, 4), seeds=(0, 1),
                         together="off", halving=halving, rungs=2)
    found = sweep(config, lambda _: None)
    assert found.judged_by == "meteor_exact_stem"
    assert found.advice is not None
    assert found.advice.arm == "r=4"
    assert found.dropped == (("r=1",) if halving else ())
    assert found.best == str(tmp_path / "best")
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["adapter_model.safetensors"]


def test_halving_stops_where_no_arm_has_the_figure(tmp_path: Path, train: TrainConfig, made_up: Any) -> None:
    made_up(loss)
    config = SweepConfig(train=replace(train, out=str(tmp_path)), ranks=(1, 2), seeds=(0,), together="off", halving=2)
    with pytest.raises(TrainingError, match="rung 1 of halving: no arm has the figure exact_match"):
        sweep(config, lambda _: None)


def test_a_study_under_way_is_the_table_of_its_finished_runs(tmp_path: Path, train: TrainConfig, made_up: Any) -> None:
    done = made_up(loss)
    config = CompareConfig(train=replace(train, out=str(tmp_path)), methods=("lora", "full"), seeds=(0, 1),
                           together="off")
    whole = compare(config, lambda line: None)
    assert so_far(config) == whole
    (done[3] / "outcome.json").unlink()
    lora, full = so_far(config).rows
    assert (lora.seeds, full.seeds) == ((0, 1), (0,))
    assert full.figures["loss"].mean == 1.0
    assert len(done) == 4
