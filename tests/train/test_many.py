"""The law: N jobs together are N runs alone, whatever their neighbours do; and what else a set promises."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltaw
from deltaw.bases import Base
from deltaw.core import stacks
from deltaw.errors import ConfigError, DataError, StateError, TargetError
from deltaw.plan import Plan, plan
from deltaw.plan.devices import Device
from deltaw.train import Job, TrainMany, train_many
from deltaw.train.passes import gradients
from deltaw.train.progress import read_metrics
from deltaw.train.state import Batch
from tests.train.many_sets import Make, config_maker, differences, together, unlike

SAME = 1e-6
"""fp32, 50 steps: relative difference of every tensor (in norm) and of every loss."""


@pytest.fixture
def make(base_folder: Path, color_rows: Path, tmp_path: Path) -> Make:
    return config_maker(base_folder, color_rows, tmp_path)


@pytest.fixture
def alone(make: Make, tmp_path: Path) -> Any:
    """A function that makes a run alone, and says how far a job of the set is from it."""
    def compare(name: str, **options: Any) -> tuple[float, float]:
        config = next(c for c in unlike(make, "alone", **options) if c.name == name)
        deltaw.train(config, quiet=True)
        return differences(Path(config.out), tmp_path / "many" / name)

    return compare


def statuses(result: Any) -> dict[str, str]:
    return {name: job.status for name, job in result.jobs.items()}


@pytest.mark.slow
def test_fifty_steps_together_are_fifty_steps_alone(make: Make, alone: Any, tmp_path: Path) -> None:
    jobs = unlike(make, max_steps=50, eval_every=20)
    result = train_many(jobs, together(tmp_path), quiet=True)
    assert statuses(result) == dict.fromkeys("abcd", "finished")
    assert not [line for line in result.lines if "passes of its own" in line]
    assert result.rounds == 50
    for job in jobs:
        tensors, losses = alone(job.name, max_steps=50, eval_every=20)
        assert tensors <= SAME, job.name
        assert losses <= SAME, job.name
    assert result.tokens == sum(job.result.tokens for job in result.jobs.values() if job.result)


@pytest.mark.slow
def test_a_small_budget_changes_who_steps_and_not_what_is_learned(make: Make, alone: Any, tmp_path: Path) -> None:
    with TrainMany(unlike(make), together(tmp_path, budget_tokens=90), quiet=True) as many:
        result = many.run()
    assert result.rounds > 12
    for name in "bc":
        assert max(alone(name)) <= SAME, name


def test_a_set_is_planned_before_its_first_round(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the memory of all its jobs, and refused where that cannot be had."""
    plans: list[Plan] = []

    def kept(*asked: Any, **options: Any) -> Plan:
        plans.append(plan(*asked, **options))
        return plans[-1]

    monkeypatch.setattr("deltaw.train.foresight.plan", kept)

    def peak(count: int) -> int:
        jobs = [make(f"{count}-{i}", max_steps=1) for i in range(count)]
        with TrainMany(jobs, together(tmp_path / str(count)), quiet=True) as many:
            assert any("at the peak" in line for line in many.lines)
        return plans[-1].methods[0].peak

    one, eight = peak(1), peak(8)
    assert eight > one
    device = Device(name="a small one", kind="cpu", memory=int(one / 2))
    monkeypatch.setattr("deltaw.plan.run.find_device", lambda *_: device)
    monkeypatch.setattr("deltaw.train.many.check_weights", lambda _: None)
    with pytest.raises(ConfigError, match="this set of 2 jobs: needs about"):
        train_many([make("a"), make("b")], together(tmp_path), quiet=True)
    warned = [make(name, plan="warn", max_steps=3) for name in "cd"]
    result = train_many(warned, together(tmp_path), quiet=True)
    assert statuses(result) == dict.fromkeys("cd", "finished")
    assert any("DOES NOT FIT" in line for line in result.lines)


def test_a_neighbour_that_diverges_is_stopped_and_nobody_else(make: Make, alone: Any, tmp_path: Path) -> None:
    bad = make("bad", learning_rate=1e30, schedule="constant", warmup_steps=0, max_grad_norm=0.0, save_every=1)
    result = train_many([bad, *unlike(make)], together(tmp_path), quiet=True)
    assert statuses(result) == {"bad": "failed", **dict.fromkeys("abcd", "finished")}
    assert result.failed == ("bad",)
    assert "the loss is" in result.jobs["bad"].error
    assert result.jobs["bad"].checkpoint is not None
    for name in "ad":
        assert max(alone(name)) <= SAME, name


@pytest.mark.slow
def test_late_early_paused_removed(make: Make, alone: Any, tmp_path: Path) -> None:
    a, b, c, d = unlike(make)
    with TrainMany([a, b, make("short", max_steps=3)], together(tmp_path), quiet=True) as many:
        for number in range(60):
            match number:
                case 2:
                    many.add(c)
                case 4:
                    many.pause("a")
                case 5:
                    many.add(d)
                    many.add(make("dropped", max_steps=50))
                case 8:
                    many.cancel("dropped")
                case 9:
                    many.resume("a")
            if not many.round():
                break
        result = many.result()
    assert statuses(result) == {**dict.fromkeys(("a", "b", "short", "c", "d"), "finished"), "dropped": "cancelled"}
    assert result.jobs["dropped"].steps == 3
    for name in "acd":
        assert max(alone(name)) <= SAME, name


def test_jobs_of_one_layout_are_computed_in_place_and_equal_runs_alone(
        make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their factors lie side by side; one joins late, one ends early, one is paused, and each length occurs."""
    counts: list[int] = []
    plain = stacks.BankStacks.__init__

    def noting(self: Any, places: Any, *args: Any) -> None:
        counts.append(len(places))
        plain(self, places, *args)

    monkeypatch.setattr(stacks.BankStacks, "__init__", noting)

    def alike(place: str) -> list[deltaw.TrainConfig]:
        return [make(f"j{n}", place, seed=n // 2, learning_rate=1e-3 * (n + 1), max_steps=4 if n == 1 else 12,
                     lora=deltaw.LoraConfig(r=4, lora_alpha=2 + n), loraplus_lr_ratio=4.0 if n == 2 else 1.0,
                     batch_size=2) for n in range(4)]

    *first, last = alike("many")
    with TrainMany(first, together(tmp_path), quiet=True) as many:
        for number in range(40):
            match number:
                case 3:
                    many.add(last)
                case 6:
                    many.pause("j0")
                case 8:
                    many.resume("j0")
            if not many.round():
                break
        result = many.result()
    assert statuses(result) == dict.fromkeys(("j0", "j1", "j2", "j3"), "finished")
    assert max(counts) >= 2
    for config in alike("alone"):
        deltaw.train(config, quiet=True)
        assert max(differences(Path(config.out), tmp_path / "many" / config.name)) <= SAME, config.name


@pytest.mark.slow
def test_a_cancelled_job_goes_on_alone(make: Make, tmp_path: Path) -> None:
    with TrainMany(unlike(make), together(tmp_path), quiet=True) as many:
        for _ in range(5):
            many.round()
        many.cancel("b")
        many.run()
    config = json.loads((tmp_path / "many" / "b" / "train_config.json").read_text())
    deltaw.train(deltaw.TrainConfig.from_dict(config | {"resume": True}), quiet=True)
    deltaw.train(unlike(make, "alone")[1], quiet=True)
    assert max(differences(tmp_path / "alone" / "b", tmp_path / "many" / "b")) <= SAME


KILLED = """
import os, signal, sys
from pathlib import Path
from deltaw.train import TrainMany
from tests.train.many_sets import config_maker, together, unlike

base, rows, out = sys.argv[1:]
class Dying(TrainMany):
    def round(self):
        if self.rounds == 6: os.kill(os.getpid(), signal.SIGKILL)
        return super().round()
jobs = unlike(config_maker(Path(base), Path(rows), Path(out)))
with Dying(jobs, together(Path(out), save_every=4, budget_tokens=150), quiet=True) as many:
    many.run()
"""


@pytest.mark.slow
def test_a_killed_set_goes_on_bit_for_bit(make: Make, base_folder: Path, color_rows: Path, tmp_path: Path,
                                          repo: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(base_folder), str(color_rows), str(tmp_path / "killed")],
                            cwd=repo, check=False, capture_output=True)
    assert killed.returncode == -9
    again = config_maker(base_folder, color_rows, tmp_path / "killed")
    resumed = train_many(unlike(again), together(tmp_path / "killed", save_every=4, budget_tokens=150, resume=True),
                         quiet=True)
    assert statuses(resumed) == dict.fromkeys("abcd", "finished")
    whole = config_maker(base_folder, color_rows, tmp_path / "whole")
    train_many(unlike(whole), together(tmp_path / "whole", save_every=4, budget_tokens=150), quiet=True)
    for name in "abcd":
        files = [tmp_path / place / "many" / name / "adapter_model.safetensors" for place in ("killed", "whole")]
        assert files[0].read_bytes() == files[1].read_bytes(), name
        assert differences(files[0].parent, files[1].parent) == (0.0, 0.0)


def test_an_unfinished_set_is_not_overwritten(make: Make, tmp_path: Path) -> None:
    with TrainMany(unlike(make), together(tmp_path), quiet=True) as many:
        many.round()
        many.save()
    with pytest.raises(ConfigError, match="holds a set that was not finished"):
        train_many(unlike(make, "elsewhere"), together(tmp_path), quiet=True)


# -- what goes wrong in one job ----------------------------------------------------------------------------------------


class RunsDry:
    """A stream that ends."""

    def __init__(self, batches: Any, count: int) -> None:
        self.batches, self.left = batches, count

    def __next__(self) -> Batch:
        if not self.left:
            raise StopIteration
        self.left -= 1
        return next(self.batches)

    def state_dict(self) -> dict[str, Any]:
        return {"left": self.left}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.left = state["left"]


def test_data_that_runs_dry_ends_that_job_with_its_state(make: Make, alone: Any, tmp_path: Path) -> None:
    from deltaw.train.examples import ExampleBatches, Layout, examples_for

    config = make("dry")

    def padded(base: Base) -> ExampleBatches:
        return ExampleBatches(examples_for(config, base).stream(), Layout(base, packed=False))

    dry = Job(config=config, batches=lambda base: RunsDry(padded(base), 5))
    result = train_many([dry, *unlike(make)], together(tmp_path), quiet=True)
    assert result.failed == ("dry",)
    assert "ran dry at step 6" in result.jobs["dry"].error
    assert result.jobs["dry"].steps == 5
    assert result.jobs["dry"].checkpoint == str(tmp_path / "many" / "dry" / "checkpoints" / "step-00000005")
    assert max(alone("a")) <= SAME


@pytest.mark.slow
def test_a_full_disk_at_one_jobs_checkpoint(make: Make, alone: Any, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    from deltaw.store import atomic

    check = atomic._check_space

    def full(target: Path, needed: int) -> None:
        if target.parent.parent.name == "full" and target.name >= "step-00000006":
            raise OSError(28, "No space left on device")
        check(target, needed)

    monkeypatch.setattr(atomic, "_check_space", full)
    result = train_many([make("full", save_every=3), *unlike(make)], together(tmp_path), quiet=True)
    assert result.failed == ("full",)
    assert "the disk is full" in result.jobs["full"].error
    assert result.jobs["full"].checkpoint == str(tmp_path / "many" / "full" / "checkpoints" / "step-00000003")
    assert max(alone("b")) <= SAME


class Deaf:
    """A loss that no adapter has a part in."""

    def units(self, batch: Mapping[str, Tensor]) -> int:
        return 1

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return torch.ones(())


def test_a_job_that_fails_the_doctor(make: Make, alone: Any, tmp_path: Path) -> None:
    result = train_many([Job(config=make("deaf"), objective=Deaf()), *unlike(make)], together(tmp_path), quiet=True)
    assert result.failed == ("deaf",)
    assert "no tensor of the tuning got a gradient" in result.jobs["deaf"].error
    assert max(alone("a")) <= SAME


def test_every_fault_of_every_job_before_anything_is_loaded(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        train_many([make("a"), make("a"), make("b", dtype="auto"), Job(config=make("c"), priority=0)],
                   together(tmp_path), quiet=True)
    text = str(caught.value)
    assert "job 'a': name: 'a' is that of another job too" in text
    assert "job 'b': dtype: got 'auto'; expected 'fp32'" in text
    assert "job 'c': priority: got 0" in text
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "x"}\n')
    with pytest.raises((DataError, TargetError)) as caught_data:
        train_many([make("a", data=str(bad)), make("b", lora=deltaw.LoraConfig(target_modules=["q_porj"])),
                    make("c", data=str(tmp_path / "none.jsonl"))], together(tmp_path), quiet=True)
    text = str(caught_data.value)
    assert "job 'a': " in text
    assert "job 'b': " in text
    assert "Did you mean q_proj" in text
    assert "job 'c': data" in text
    assert not (tmp_path / "many").exists()


def test_adding_a_job_with_a_fault_leaves_the_set_as_it_was(make: Make, tmp_path: Path) -> None:
    with TrainMany([make("a")], together(tmp_path), quiet=True) as many:
        many.round()
        with pytest.raises(TargetError):
            many.add(make("b", lora=deltaw.LoraConfig(target_modules=["nowhere"])))
        with pytest.raises(ConfigError, match="that of another job too"):
            many.add(make("a"))
        with pytest.raises(StateError, match="is not in the set"):
            many.cancel("z")
        result = many.run()
    assert statuses(result) == {"a": "finished"}


# -- how it is computed ------------------------------------------------------------------------------------------------


def test_priorities_decide_who_steps_more(make: Make, tmp_path: Path) -> None:
    jobs = [Job(config=make(name, max_steps=40), priority=p) for name, p in (("slow", 1.0), ("fast", 3.0))]
    with TrainMany(jobs, together(tmp_path, budget_tokens=1), quiet=True) as many:
        for _ in range(40):
            many.round()
        assert many.jobs["fast"].steps == pytest.approx(3 * many.jobs["slow"].steps, abs=2)


def test_a_memory_limit_lowers_the_budget(make: Make, tmp_path: Path) -> None:
    with TrainMany([make("a"), make("b")], together(tmp_path, memory=0.1255), quiet=True) as many:
        assert 1 < many.scheduler.budget < 1024
        assert many.scheduler.budget * many.bytes_per_token < 0.1255 * 2**30


@pytest.mark.slow
def test_a_base_with_dropout_takes_turns_and_is_equal_too(tmp_path: Path, color_rows: Path, tokenizer: Any) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=64,
                               bos_token_id=1, eos_token_id=2, pad_token_id=0)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    make = config_maker(folder, color_rows, tmp_path)
    names = {"x": {"seed": 1}, "y": {"seed": 2, "lora": deltaw.LoraConfig(r=2, lora_dropout=0.1)}}
    result = train_many([make(n, **o) for n, o in names.items()], together(tmp_path), quiet=True)
    assert sum("passes of its own: the base draws random numbers" in line for line in result.lines) == 2
    for name, options in names.items():
        deltaw.train(make(name, "alone", **options), quiet=True)
        assert differences(tmp_path / "alone" / name, tmp_path / "many" / name) == (0.0, 0.0)


def test_no_gradient_or_optimizer_state_for_who_has_no_tokens(make: Make, tmp_path: Path) -> None:
    with TrainMany([make("a"), make("b"), make("rests")], together(tmp_path), quiet=True) as many:
        many.pause("rests")
        many.round()
        resting = many.jobs["rests"].run
        assert resting is not None
        assert not resting.optimizer.state
        assert all(p.grad is None for p in many.board.parameters("rests").values())


def test_base_is_measured_once_for_jobs_with_the_same_rows(make: Make, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    from deltaw.train import run

    calls: list[int] = []
    evaluate = run.evaluate
    monkeypatch.setattr(run, "evaluate", lambda *a, **k: calls.append(1) or evaluate(*a, **k))
    train_many([make(n, max_steps=2, doctor_steps=2) for n in "abc"], together(tmp_path), quiet=True)
    assert len(calls) == 1 + 3


def test_nan_rows_do_not_leave_their_job(make: Make, tmp_path: Path) -> None:
    """A loss of NaN in a shared pass is left out of the sum, and the others' gradients are those without it."""
    with TrainMany(unlike(make), together(tmp_path), quiet=True) as many:
        many.round()
        with torch.no_grad():
            for parameter in many.board.parameters("b").values():
                parameter.fill_(float("nan"))
        chosen = list(many.running())
        for job in chosen:
            job.draw()
        many.base.model.train()
        losses, _ = gradients(many.board, chosen, many.scheduler.budget, many._failing)
        assert math.isnan(sum(losses["b"]))
        for name in "acd":
            assert all(math.isfinite(loss) for loss in losses[name])
            assert all(bool(p.grad.isfinite().all()) for p in many.board.parameters(name).values()
                       if p.grad is not None)


def test_metrics_are_each_jobs_own(make: Make, tmp_path: Path) -> None:
    train_many([make("a", eval_every=4), make("b", eval_every=6)], together(tmp_path), quiet=True)
    held = {n: [r["step"] for r in read_metrics(tmp_path / "many" / n / "metrics.jsonl") if r["event"] == "eval"]
            for n in "ab"}
    assert held == {"a": [0, 4, 8, 12], "b": [0, 6, 12]}
