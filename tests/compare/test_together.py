"""Runs of a study that train together: the figures of runs alone, whatever fails or breaks off."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import deltaw
from deltaw.compare import study, together
from deltaw.compare.run import RUNS, TUNED, Outcome, Run, prepared, read_outcome, write_outcome
from deltaw.compare.study import run_study, sets_of
from deltaw.compare.table import rows_of
from deltaw.compare.worker import main
from tests.cli.conftest import questions, write_base, write_rows
from tests.train.many_sets import differences


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options that all runs share."""
    folder = tmp_path_factory.mktemp("base")
    data = write_rows(folder / "yes.jsonl", questions("yes"))
    train = deltaw.TrainConfig(model=str(write_base(folder / "base")), data=str(data), out="unused", max_steps=8,
                               batch_size=2, learning_rate=0.02, eval_rows=4, eval_every=4, device="cpu", dtype="fp32",
                               metrics=("exact_match",), max_new_tokens=4, compile="off", cache_data=False)
    return {name: value for name, value in train.to_dict().items() if name not in ("out", "threads")}


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Workers that need no process of their own; what each was given to do."""
    given: list[list[str]] = []

    def process(log: Path, places: list[Path]) -> int:
        given.append([place.parents[1].name for place in places])
        return main(places)

    monkeypatch.setattr(study, "_process", process)
    return given


def ranks(shared: Mapping[str, Any], *wanted: int, **more: Any) -> list[Run]:
    return [Run(arm=f"r={r}", seed=0, train={**shared, "lora": {"r": r}, **more}) for r in wanted]


def test_only_runs_that_share_a_base_and_are_plain_lora_go_together(shared: dict[str, Any]) -> None:
    def run(arm: str, **more: Any) -> Run:
        return Run(arm=arm, seed=0, train={**shared, **more})

    runs = [run("a"), run("full", method="full"), run("b", learning_rate=1e-3), run("other", model="elsewhere"),
            run("compiled", compile="on"), run("classes", task="seq-cls"), run("packed", quantize="nf4"),
            run("packed too", quantize="nf4", seed=1)]
    assert [[r.arm for r in members] for members in sets_of(runs)] == [["a", "b"], ["packed", "packed too"]]
    assert sets_of(runs[:2]) == []


def test_ranks_together_have_the_figures_of_ranks_alone(tmp_path: Path, shared: dict[str, Any],
                                                        in_this_process: list[list[str]]) -> None:
    test = write_rows(tmp_path / "test.jsonl", questions("yes")[:6])
    runs = [dataclasses.replace(run, test=str(test), latency=run.arm == "r=1") for run in ranks(shared, 1, 4)]
    lines: list[str] = []
    apart = run_study(tmp_path / "apart", runs, lines.append, together=False)
    joint = run_study(tmp_path / "joint", runs, lines.append, together=True)
    assert in_this_process == [["r=1"], ["r=4"], ["r=1", "r=4"]]
    assert [o.status for o in joint] == ["done", "done"]
    assert [o.together for o in apart] + [o.together for o in joint] == [1, 1, 2, 2]
    for run, one, other in zip(runs, apart, joint, strict=True):
        for name, figure in one.figures.items():
            assert other.figures[name] == pytest.approx(figure, rel=1e-5), (run.arm, name)
        assert (one.rows, one.parameters, one.base_parameters, one.steps) == (
            other.rows, other.parameters, other.base_parameters, other.steps)
        assert [step for step, _ in one.curve] == [step for step, _ in other.curve]
        assert set(one.latency) == set(other.latency)
        assert max(differences(tmp_path / "apart" / run.place / TUNED, tmp_path / "joint" / run.place / TUNED)) <= 1e-5
    assert [row.together for row in rows_of(runs, joint)] == [2, 2]
    assert any(line.startswith("2 runs together: r=1, seed 0; r=4, seed 0") for line in lines)
    # Judged otherwise, beside one that is new: nothing is trained again, and the new one trains alone.
    later = [dataclasses.replace(run, test_rows=3) for run in runs] + ranks(shared, 2)
    outcomes = run_study(tmp_path / "joint", later, lines.append, together=True)
    assert [(o.status, o.together, o.rows) for o in outcomes[:2]] == [("done", 2, 3)] * 2
    assert (outcomes[2].status, outcomes[2].together) == ("done", 1)
    assert [o.peak_memory for o in outcomes[:2]] == [o.peak_memory for o in joint]


def test_what_fails_in_a_set_is_a_row_and_the_rest_go_on(tmp_path: Path, shared: dict[str, Any],
                                                         in_this_process: list[list[str]]) -> None:
    bad = {"nowhere": {"lora": {"r": 2, "target_modules": ["nowhere"]}},
           "no rows": {"data": str(tmp_path / "no.jsonl")},
           "diverges": {"learning_rate": 1e30, "max_grad_norm": 0.0, "schedule": "constant", "warmup_steps": 0}}
    runs = [Run(arm=arm, seed=0, train={**shared, **options}) for arm, options in bad.items()] + ranks(shared, 1, 2)
    outcomes = run_study(tmp_path, runs, lambda _: None, together=True)
    assert [o.status for o in outcomes] == ["n/a", "failed", "failed", "done", "done"]
    assert "nowhere" in outcomes[0].reason
    assert "no.jsonl" in outcomes[1].reason
    assert "the loss is" in outcomes[2].reason
    assert len(in_this_process) == 1
    assert run_study(tmp_path, runs[3:], lambda _: None, together=True) == outcomes[3:]
    assert len(in_this_process) == 1  # what is done is read


def test_a_set_that_was_broken_off_goes_on_where_each_run_was(tmp_path: Path, shared: dict[str, Any],
                                                              in_this_process: list[list[str]],
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    runs = ranks(shared, 1, 4, save_every=2)
    whole = run_study(tmp_path / "whole", runs, lambda _: None, together=True)
    begin = together.TrainMany.round

    def stopped(many: Any) -> bool:
        if many.rounds == 5:
            raise KeyboardInterrupt
        return begin(many)

    folder = tmp_path / "cut"
    monkeypatch.setattr(together.TrainMany, "round", stopped)
    monkeypatch.setattr(study, "_process", lambda log, places: main(places))
    assert study.execute_together(folder, runs) == 130
    assert read_outcome(folder, runs[0]) is None
    monkeypatch.setattr(together.TrainMany, "round", begin)
    resumed = run_study(folder, runs, lambda _: None, together=True)
    assert [o.figures for o in resumed] == [o.figures for o in whole]
    for run in runs:
        files = [tmp_path / name / run.place / TUNED / "adapter_model.safetensors" for name in ("whole", "cut")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_run_begun_alone_goes_on_in_a_set(tmp_path: Path, shared: dict[str, Any],
                                            in_this_process: list[list[str]]) -> None:
    """As in a study that was begun before runs trained together."""
    runs = ranks(shared, 1, 4, save_every=2)
    place = prepared(tmp_path, runs[0])
    options = {**shared, "lora": {"r": 1}, "save_every": 2, "out": str(place / TUNED), "samples": 0, "resume": True}
    config = deltaw.TrainConfig.from_dict(options)
    with pytest.raises(KeyboardInterrupt):
        _train_until(config, 4)
    outcomes = run_study(tmp_path, runs, lambda _: None, together=True)
    assert [o.status for o in outcomes] == ["done", "done"]
    steps = [row["step"] for row in map(json.loads, (place / TUNED / "metrics.jsonl").read_text().splitlines())
             if row["event"] == "step"]
    assert steps == list(range(1, 9))


def _train_until(config: deltaw.TrainConfig, step: int) -> None:
    from deltaw.train import loop

    settle = loop.Run.settle

    def stopping(run: Any, *args: Any) -> None:
        if run.state.step == step:
            raise KeyboardInterrupt
        settle(run, *args)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop.Run, "settle", stopping)
        deltaw.train(config, quiet=True)


def test_runs_of_a_process_that_is_killed_are_tried_one_by_one(tmp_path: Path, shared: dict[str, Any],
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    runs, given, lines = ranks(shared, 1, 2, 4), list[int](), list[str]()

    def process(log: Path, places: list[Path]) -> int:
        given.append(len(places))
        if len(places) > 1:
            write_outcome(places[0], Outcome(identity=runs[0].identity, status="done", figures={"loss": 1.0}))
            return -9
        return main(places)

    monkeypatch.setattr(study, "_process", process)
    outcomes = run_study(tmp_path, runs, lines.append, together=True)
    assert given == [3, 1, 1]
    assert [o.status for o in outcomes] == ["done", "done", "done"]
    assert outcomes[0].figures == {"loss": 1.0}
    assert any("ended with -9" in line for line in lines)


def test_adapters_beyond_the_memory_take_turns(tmp_path: Path, shared: dict[str, Any],
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    place = {run.place: run for run in ranks(shared, 1, 2, 4, 1)}
    configs = {p: together.config_of(run, tmp_path) for p, run in place.items()}
    jobs = {p: together.Job(config=config) for p, config in together.named(configs, place).items()}
    per_rank = 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))  # layers · Σ (I + O), as in test_worker
    room = 4 * per_rank * together.BYTES_PER_VALUE / together.SHARE_OF_MEMORY
    monkeypatch.setattr(together, "available_memory", lambda: int(room))
    sizes = [[job.config.lora.r for job in part.values()] for part in together.portions(jobs)]
    assert sizes == [[1, 2], [4]]  # the second of rank 1 has the place of the first: the same arm and seed


@pytest.mark.slow
def test_a_set_in_a_process_of_its_own_leaves_outcomes_and_a_log(tmp_path: Path, shared: dict[str, Any]) -> None:
    runs = ranks(shared, 1, 2)
    outcomes = run_study(tmp_path, runs, lambda _: None, together=True)
    assert [(o.status, o.together) for o in outcomes] == [("done", 2)] * 2
    assert "together: passes of up to" in (tmp_path / RUNS / study.SET_LOG).read_text(encoding="utf-8")
