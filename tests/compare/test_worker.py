"""One run of a study as its own process does it, on a tiny model: trained, judged from its folder, timed."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from deltaw.compare.run import SPEC, Outcome, Run, prepared, read_outcome
from deltaw.compare.worker import data_of, main, step_seconds
from deltaw.train import loop
from deltaw.train import run as worker_train
from deltaw.train.config import TrainConfig
from tests.cli.conftest import questions, write_base, write_rows


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("study")
    data = write_rows(folder / "yes.jsonl", questions("yes"))
    train = TrainConfig(model=str(write_base(folder / "base")), data=str(data), out="unused", max_steps=12,
                        batch_size=4, learning_rate=0.02, eval_rows=4, device="cpu", dtype="fp32",
                        metrics=("exact_match",), max_new_tokens=4)
    options = train.to_dict()
    for name in ("out", "threads"):
        del options[name]
    return options


def done(folder: Path, run: Run) -> Outcome:
    place = folder / run.place
    place.mkdir(parents=True)
    (place / SPEC).write_text(json.dumps(asdict(run) | {"identity": run.identity}), encoding="utf-8")
    assert main([place]) == 0
    outcome = read_outcome(folder, run)
    assert outcome is not None
    return outcome


def again(folder: Path, run: Run) -> Outcome:
    """The run as a study does it in a folder where it may have been before."""
    assert main([prepared(folder, run)]) == 0
    outcome = read_outcome(folder, run)
    assert outcome is not None
    return outcome


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_is_trained_judged_and_timed(tmp_path: Path, shared: dict[str, Any], method: str) -> None:
    test = write_rows(tmp_path / "test.jsonl", questions("yes")[:6])
    run = Run(arm=method, seed=0, train={**shared, "method": method}, test=str(test), test_rows=5, latency=True)
    outcome = done(tmp_path, run)
    assert (outcome.status, outcome.rows, outcome.steps) == ("done", 5, 12)
    assert set(outcome.figures) == {"loss", "exact_match"}
    times = {"base_1", "tuned_1", "base_16", "tuned_16"} | ({"merged_1", "merged_16"} if method == "lora" else set())
    assert set(outcome.latency) == times
    assert all(seconds > 0 for seconds in outcome.latency.values())
    # A 2-layer Llama of width 32: 48 wide feed-forward, 20 words in two tables, 3 norms of each kind.
    whole = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32) + 32 + 2 * 20 * 32
    assert outcome.base_parameters == whole
    low_rank = 8 * 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))  # r · layers · Σ (I + O)
    assert outcome.parameters == (whole if method == "full" else low_rank)


def test_another_way_of_judging_trains_nothing(tmp_path: Path, shared: dict[str, Any],
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """On held-out rows and on test data; the figures are those that a run which was judged so at once has."""
    test = str(write_rows(tmp_path / "test.jsonl", questions("yes")[:6]))
    run = Run(arm="lora", seed=0, train={**shared, "metrics": []})
    ways = [{"train": {**shared, "metrics": ["exact_match", "bleu"], "max_new_tokens": 3}},
            {"test": test}, {"test": test, "test_rows": 3}, {"test": test, "latency": True}]
    first = again(tmp_path / "study", run)
    assert set(first.figures) == {"loss"}
    monkeypatch.setattr(worker_train, "train", lambda *_, **__: pytest.fail("trained again"))
    judged = [again(tmp_path / "study", dataclasses.replace(run, **{"train": shared, **way})) for way in ways]
    monkeypatch.undo()
    for way, outcome in zip(ways[:2], judged, strict=False):
        whole = again(tmp_path / "anew", dataclasses.replace(run, arm=str(len(str(way))), **{"train": shared, **way}))
        assert outcome.figures == pytest.approx(whole.figures)
        assert (outcome.rows, set(outcome.latency)) == (whole.rows, set(whole.latency))
    assert again(tmp_path / "study", run).figures == pytest.approx(first.figures)


def test_a_run_that_was_broken_off_goes_on_although_it_is_judged_otherwise(tmp_path: Path, shared: dict[str, Any],
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(arm="lora", seed=0, train={**shared, "eval_every": 4, "metrics": []})
    settle = loop.Run.settle

    def stopping(loop_run: Any, *args: Any) -> None:
        if loop_run.state.step == 8:
            raise KeyboardInterrupt
        settle(loop_run, *args)

    with monkeypatch.context() as patched:
        patched.setattr(loop.Run, "settle", stopping)
        assert main([prepared(tmp_path, run)]) == 130
    outcome = again(tmp_path, dataclasses.replace(run, train={**run.train, "metrics": ["exact_match"]}))
    assert (outcome.status, set(outcome.figures)) == ("done", {"loss", "exact_match"})
    lines = (tmp_path / run.place / "adapter" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [row["step"] for row in map(json.loads, lines) if row["event"] == "step"] == list(range(1, 13))


def test_a_method_that_does_not_apply_is_told_from_one_that_failed(tmp_path: Path, shared: dict[str, Any]) -> None:
    outcome = done(tmp_path, Run(arm="bitfit", seed=0, train={**shared, "method": "bitfit"}))
    assert outcome.status == "n/a"
    assert "bias" in outcome.reason
    outcome = done(tmp_path, Run(arm="lora", seed=0, train={**shared, "data": str(tmp_path / "none.jsonl")}))
    assert outcome.status == "failed"
    assert "none.jsonl" in outcome.reason
    outcome = done(tmp_path, Run(arm="wrong", seed=0, train={**shared, "learning_rate": -1.0}))
    assert outcome.status == "failed"
    assert "learning_rate" in outcome.reason


def test_few_examples_are_part_of_the_more(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {n}", "completion": "yes"} for n in range(50)]
    data = write_rows(tmp_path / "rows.jsonl", rows)

    def chosen(size: int, seed: int) -> set[str]:
        run = Run(arm="a", seed=seed, size=size, train={"data": str(data), "valid": 0.1})
        options = data_of(run, tmp_path)
        assert options["valid"] == 0.1
        lines = Path(options["data"]).read_text(encoding="utf-8").splitlines()
        return {json.loads(line)["prompt"] for line in lines}

    assert len(chosen(10, 0)) == 10
    assert chosen(10, 0) < chosen(30, 0)
    assert chosen(10, 0) != chosen(10, 1)
    assert data_of(Run(arm="a", seed=0, train={"data": str(data)}), tmp_path) == {}


def test_answers_are_written_to_the_test_data_alone_unless_they_choose_the_best_step(
        tmp_path: Path, shared: dict[str, Any]) -> None:
    test = str(write_rows(tmp_path / "test.jsonl", questions("yes")[:4]))
    for best, measured in (("loss", {"loss"}), ("exact_match", {"loss", "exact_match"})):
        run = Run(arm=best, seed=0, train={**shared, "keep_best": best}, test=test)
        assert set(done(tmp_path, run).figures) == {"loss", "exact_match"}
        rows = (tmp_path / run.place / "adapter" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        found = [set(row) - {"event", "step"} for row in map(json.loads, rows) if row["event"] == "eval"]
        assert found[0] == measured


def test_the_time_of_a_step_is_the_median(tmp_path: Path) -> None:
    ends = [1.0, 2.0, 33.0, 34.5, 36.0]  # the third step waited for something else
    assert step_seconds([{"event": "step", "seconds": end} for end in ends] + [{"event": "eval"}]) == 1.5
    assert step_seconds([]) == 0.0
