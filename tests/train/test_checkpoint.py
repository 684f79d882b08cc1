"""A resumed run equals the one that was never stopped, bit for bit; damaged and foreign checkpoints are not used."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import deltaw
from deltaw.errors import AdapterFileError, TrainingError
from deltaw.store import atomic
from deltaw.train.checkpoint import Checkpoints
from deltaw.train.loop import fit
from deltaw.train.objective import CausalLoss
from deltaw.train.optimizer import adamw
from deltaw.train.state import Pace, State
from deltaw.train.tuning import LoraTuning


class Run:
    """A small run with dropout, evaluation and weight decay, ready to be stopped anywhere."""

    def __init__(self, model: Any, batches: Any, folder: Path, keep: int = 10) -> None:
        self.tuning = LoraTuning(deltaw.attach(model, deltaw.LoraConfig(r=4, lora_dropout=0.3), seed=3))
        self.optimizer = adamw(self.tuning.parameters(), learning_rate=1e-2, weight_decay=0.1)
        self.batches, self.checkpoints = batches, Checkpoints(folder, {"seed": 0}, keep=keep)
        self.losses: list[float] = []

    def step(self, state: State, *, loss: float, rate: float, norm: float) -> None:
        self.losses.append(loss)

    def evaluated(self, state: State, figures: Any) -> None: ...

    def go(self, until: int, *, state: State | None = None, save_every: int = 1) -> State:
        torch.manual_seed(7)
        if state is None and (path := self.checkpoints.latest()) is not None:
            state = self.checkpoints.restore(path, self.tuning, self.optimizer, self.batches)
        return fit(self.tuning, CausalLoss(), self.batches, self.optimizer, watch=self, state=state,
                   pace=Pace(steps=until, rate=lambda step: 1e-2 / (1 + step), accumulate=2, max_grad_norm=1.0,
                             eval_every=2, save_every=save_every, keep_best="loss"),
                   evaluate=lambda: {"loss": self.losses[-1]}, checkpoints=self.checkpoints)


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_resumed_run_equals_the_uninterrupted_one(stop: int, tmp_path: Path, tiny_llama: Any,
                                                    text_batches: Callable[..., Any]) -> None:
    whole = Run(tiny_llama(), text_batches(), tmp_path / "whole")
    expected = whole.go(6)
    Run(tiny_llama(), text_batches(), tmp_path / "cut").go(stop)
    resumed = Run(tiny_llama(), text_batches(), tmp_path / "cut")
    with torch.no_grad():
        for parameter in resumed.tuning.parameters().values():
            parameter.fill_(9.0)
    state = resumed.go(6)
    assert resumed.losses == whole.losses[stop:]
    for name, parameter in whole.tuning.parameters().items():
        assert torch.equal(parameter, resumed.tuning.parameters()[name])
        assert torch.equal(expected.best_tensors[name], state.best_tensors[name])
        ours, theirs = whole.optimizer.state[parameter], resumed.optimizer.state[resumed.tuning.parameters()[name]]
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert ours.keys() == theirs.keys()
    assert {**expected.counters(), "seconds": 0} == {**state.counters(), "seconds": 0}


def test_every_generator_goes_on_where_it_was(tmp_path: Path, tiny_llama: Any,
                                              text_batches: Callable[..., Any]) -> None:
    run = Run(tiny_llama(), text_batches(), tmp_path)
    run.go(1)
    random.gauss(0, 1)
    np.random.normal()
    path = run.checkpoints.save(State(step=2), run.tuning, run.optimizer, run.batches)
    expected = (torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.normal(size=3).tolist())
    run.checkpoints.restore(path, run.tuning, run.optimizer, run.batches)
    assert (torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.normal(size=3).tolist()) == expected


def test_the_last_ones_are_kept(tmp_path: Path, tiny_llama: Any, text_batches: Callable[..., Any]) -> None:
    Run(tiny_llama(), text_batches(), tmp_path, keep=2).go(5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]


def test_no_pickle_and_only_two_files(tmp_path: Path, tiny_llama: Any, text_batches: Callable[..., Any]) -> None:
    run = Run(tiny_llama(), text_batches(), tmp_path)
    run.go(1)
    path = run.checkpoints.latest()
    assert path is not None
    assert sorted(p.name for p in path.iterdir()) == ["state.json", "state.safetensors"]


def damage(path: Path, how: str) -> None:
    if how == "cut":
        content = (path / "state.safetensors").read_bytes()
        (path / "state.safetensors").write_bytes(content[:len(content) // 2])
    elif how == "one bit":
        content = bytearray((path / "state.safetensors").read_bytes())
        content[-1] ^= 1
        (path / "state.safetensors").write_bytes(bytes(content))
    elif how == "no facts":
        (path / "state.json").unlink()
    else:
        (path / "state.json").write_text('{"state": ')


@pytest.mark.parametrize("how", ["cut", "one bit", "no facts", "half facts"])
def test_a_damaged_checkpoint_is_passed_over(how: str, tmp_path: Path, tiny_llama: Any,
                                             text_batches: Callable[..., Any]) -> None:
    run = Run(tiny_llama(), text_batches(), tmp_path)
    run.go(3)
    assert run.checkpoints.latest() == tmp_path / "step-00000003"
    damage(tmp_path / "step-00000003", how)
    assert run.checkpoints.latest() == tmp_path / "step-00000002"


def test_a_full_disk_leaves_the_older_checkpoints(tmp_path: Path, tiny_llama: Any, text_batches: Callable[..., Any],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tiny_llama(), text_batches(), tmp_path)
    run.go(2)
    usage = atomic.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(AdapterFileError, match="disk is full"):
        run.checkpoints.save(State(step=3), run.tuning, run.optimizer, run.batches)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_another_adapters_checkpoint_is_refused(tmp_path: Path, tiny_llama: Any,
                                                text_batches: Callable[..., Any]) -> None:
    Run(tiny_llama(), text_batches(), tmp_path).go(1)
    other = Run(tiny_llama(num_hidden_layers=1), text_batches(), tmp_path)
    with pytest.raises(TrainingError, match=r"does not fit the tuning at model\.layers\.1\."):
        other.go(2)


def test_counters_are_plain_json() -> None:
    assert json.loads(json.dumps(State(step=3, best=0.5).counters()))["best"] == 0.5
