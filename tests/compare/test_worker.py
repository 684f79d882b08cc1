"""One run of a study as its own process does it, on a tiny model: trained, judged from its folder, timed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from deltaw.compare.study import SPEC, Outcome, Run, read_outcome
from deltaw.compare.worker import data_of, main, step_seconds
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


def test_a_method_that_does_not_apply_is_told_from_one_that_failed(tmp_path: Path, shared: dict[str, Any]) -> None:
    outcome = done(tmp_path, Run(arm="bitfit", seed=0, train={**shared, "method": "bitfit"}))
    assert outcome.status == "n/a"
    assert "bias" in outcome.reason
    outcome = done(tmp_path, Run(arm="lora", seed=0, train={**shared, "data": str(tmp_path / "none.jsonl")}))
    assert outcome.status == "failed"
    assert "none.jsonl" in outcome.reason


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
