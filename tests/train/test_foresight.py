"""The plan before a run: said in three lines, a refusal only of what cannot fit, and no harm where planning fails."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import deltaw.plan.run as planning
from deltaw.errors import ConfigError
from deltaw.plan import Plan, PlanConfig
from deltaw.plan.devices import Device
from deltaw.train.config import TrainConfig
from deltaw.train.foresight import (
    MARGIN,
    check_weights,
    evaluations,
    heaviest,
    look_ahead,
    look_ahead_together,
    mean_tokens,
    optimizer_steps,
)


@pytest.fixture
def run(tiny_llama: Any, tmp_path: Any) -> tuple[TrainConfig, Any, Any]:
    tiny_llama(hidden_size=128, intermediate_size=512, num_hidden_layers=4).save_pretrained(tmp_path)
    config = TrainConfig(model=str(tmp_path), data="x", out="y", device="cpu", dtype="fp32", batch_size=4)
    train = SimpleNamespace(lengths=np.array([10, 900, 1000, 20, 1100]), label_names=None,
                            stats=SimpleNamespace(tokens=3030, supervised_tokens=1515))
    examples = SimpleNamespace(train=train, train_rows=np.arange(5), config=config, batches_per_epoch=2,
                               valid=SimpleNamespace(lengths=np.array([9, 300, 40, 50, 60, 70])), valid_rows=range(5))
    return config, SimpleNamespace(folder=tmp_path, dtype=torch.float32, quantized=None), examples


def limited(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(planning, "find_device", lambda *_: Device(name="a small one", kind="cpu", memory=size))


def peak_of(said: list[str]) -> float:
    value, unit = said[1].split()[1:3]
    return float(value.replace(",", "")) * {"MB": 1e6, "GB": 1e9}[unit]


def test_a_run_that_fits_is_told_in_three_lines(run: Any) -> None:
    said = look_ahead(*run)
    assert len(said) == 3
    assert "fits" in said[2]


def test_only_what_cannot_fit_is_refused(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config, base, examples = run
    peak = peak_of(look_ahead(config, base, examples))
    limited(monkeypatch, int(peak * (1 - MARGIN) * 1.03))  # too small by the plan, and within what it may be wrong by
    assert "DOES NOT FIT" in look_ahead(config, base, examples)[2]
    limited(monkeypatch, int(peak * (1 - MARGIN) * 0.97))
    with pytest.raises(ConfigError, match="one that fits"):
        look_ahead(config, base, examples)
    warned = TrainConfig.from_dict(config.to_dict() | {"plan": "warn"})
    assert "DOES NOT FIT" in look_ahead(warned, base, examples)[2]
    silent = TrainConfig.from_dict(config.to_dict() | {"plan": "off"})
    assert look_ahead(silent, base, examples) == []


def test_weights_that_cannot_fit_are_refused_before_they_are_loaded(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run[0]
    check_weights(config)
    limited(monkeypatch, 1000)
    with pytest.raises(ConfigError, match="to be loaded"):
        check_weights(config)


def test_planning_that_fails_stops_no_run(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a network that nobody foresaw")

    monkeypatch.setattr("deltaw.train.foresight.plan", broken)
    assert look_ahead(*run) == []


def test_a_plan_draws_nothing(run: Any) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    look_ahead(*run)
    assert torch.equal(torch.rand(3), expected)


def test_the_heaviest_batch() -> None:
    lengths = [1100, 1000, 900, 20, 10]
    assert heaviest(lengths, 3, None) == (3, 1000)
    assert heaviest(lengths, 3, 2100) == (2, 1050)
    assert heaviest(lengths, 3, 500) == (1, 1100)


def asked_of(monkeypatch: pytest.MonkeyPatch, look: Callable[[], object]) -> PlanConfig:
    asked: list[PlanConfig] = []

    def kept(config: PlanConfig, **options: Any) -> Plan:
        asked.append(config)
        return planning.plan(config, **options)

    monkeypatch.setattr("deltaw.train.foresight.plan", kept)
    assert look()
    return asked[0]


def test_time_is_that_of_average_batches_and_of_all_steps(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config, base, examples = run
    found = asked_of(monkeypatch, lambda: look_ahead(config, base, examples))
    assert (found.batch_size, found.max_length) == (4, 755)  # the heaviest batch decides the memory
    assert found.mean_tokens == 3030 / 2
    assert found.steps == 2 == optimizer_steps(config, 2)
    assert optimizer_steps(replace(config, epochs=3), 2) == 6
    assert optimizer_steps(replace(config, epochs=0.1, grad_accumulation=2), 2) == 1
    padded, lengths = replace(config, packing="off", group_by_length=False), examples.train.lengths
    assert mean_tokens(padded, lengths, 2) == (3 * 1000 + 2 * 1100) / 2
    assert mean_tokens(replace(padded, group_by_length=True), lengths, 2) == (3 * 900 + 2 * 1100) / 2


def test_evaluations_read_the_held_out_rows_as_often_as_the_run_does(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config, base, examples = run
    found = asked_of(monkeypatch, lambda: look_ahead(config, base, examples))
    read = 4 * 60 + 300  # 9, 40, 50 and 60 together, 300 alone
    assert found.eval_rows == round(read / found.mean_tokens * found.batch_size)
    assert found.evaluations == evaluations(config, 2) == 4  # before, after each step, after
    assert [evaluations(replace(config, eval_every=every), 20) for every in (None, 0, 1, 6)] == [7, 2, 22, 5]
    jobs = {"one": examples, "two": SimpleNamespace(**{**vars(examples), "config": replace(config, max_steps=4)})}
    both = asked_of(monkeypatch, lambda: look_ahead_together(config, base, jobs, trained=[200, 200], tokens=512))
    asked = (4 + 6) * found.eval_rows / found.batch_size * found.mean_tokens
    assert both.evaluations * both.eval_rows / both.batch_size * both.mean_tokens == pytest.approx(asked, rel=0.2)


def test_a_set_is_asked_by_each_jobs_own_batches_and_steps(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config, base, examples = run
    wide = replace(config, lora=replace(config.lora, r=16), batch_size=1, max_steps=10)
    many = replace(config, batch_size=4, max_steps=4)
    jobs = {"wide": SimpleNamespace(**{**vars(examples), "config": wide, "batches_per_epoch": 5}),
            "many": SimpleNamespace(**{**vars(examples), "config": many})}
    found = asked_of(monkeypatch, lambda: look_ahead_together(wide, base, jobs, trained=[200, 100], tokens=512))
    assert found.tokens >= 4 * 755  # one micro-batch of the job whose batches are larger
    assert (found.lora.r, found.adapters) == (16, 2)
    read = 10 * 3030 / 5 + 4 * 3030 / 2
    assert found.steps == math.ceil(read / 512)
    assert found.mean_tokens == pytest.approx(read / found.steps)
    assert found.updates == pytest.approx(1.5 * 7 / found.steps)


def test_a_base_that_was_quantized_before_it_was_given_is_planned_as_it_is(
        run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config, base, examples = run
    jobs, resident = {"one": examples, "two": examples}, list[Any]()
    for stored, double, method in ((None, True, "lora"), ("nf4", False, "qlora"), ("int8", True, "qlora"),
                                   ("nf4, double quantization", True, "qlora"), ("gptq", True, "lora")):
        model = SimpleNamespace(get_memory_footprint=lambda: 50 << 20)
        given = SimpleNamespace(**{**vars(base), "quantized": stored, "model": model})
        found = asked_of(monkeypatch, lambda given=given: look_ahead_together(  # type: ignore[misc]
            config, given, jobs, trained=[100, 100], tokens=512))
        assert (found.methods, found.double_quant) == ((method,), double)
        assert method == "lora" or stored.startswith(found.quantize)
        resident.append(found.resident)
    for i in (1, 2, 3):  # packed weights are in memory already
        assert resident[0] - resident[i] == pytest.approx(50 << 20, abs=20 << 20)
    assert resident[4] == pytest.approx(resident[0], abs=20 << 20)


def test_where_nothing_helps_that_is_what_is_said(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, 1000)
    with pytest.raises(ConfigError, match=r"one that fits. Nothing here makes it fit: at the least it needs"):
        look_ahead(*run)
