"""A whole run from files to files; and that one which was killed or stopped ends as if it had not been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import deltaw
from deltaw.bases import load_base
from deltaw.data import load_data
from deltaw.errors import ConfigError, DataError, DoctorError
from deltaw.train import TrainInterrupted, evaluate
from deltaw.train.progress import MetricsLog, read_metrics


@pytest.fixture
def config(base_folder: Path, color_rows: Path, tmp_path: Path) -> Callable[..., deltaw.TrainConfig]:
    def make(**options: Any) -> deltaw.TrainConfig:
        defaults = {"model": str(base_folder), "data": str(color_rows), "out": str(tmp_path / "out"), "dtype": "fp32",
                    "max_steps": 8, "learning_rate": 1e-2, "eval_every": 3, "max_new_tokens": 3,
                    "lora": deltaw.LoraConfig(r=4, lora_dropout=0.2)}
        return deltaw.TrainConfig(**{**defaults, **options})

    return make


def losses(folder: Path) -> list[tuple[str, int, float]]:
    return [(row["event"], row["step"], row["loss"]) for row in read_metrics(folder / "metrics.jsonl")]


def test_a_run_learns_and_leaves_everything(config: Callable[..., deltaw.TrainConfig], tmp_path: Path,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    result = deltaw.train(config(max_steps=60, learning_rate=2e-2, metrics=("exact_match", "accuracy"), valid=0.25,
                                 lora=deltaw.LoraConfig(r=8)))
    assert result.before["exact_match"] == 0.0
    assert result.after["exact_match"] > 0.9
    assert result.after["loss"] < 0.5 * result.before["loss"]
    assert result.trained_parameters == sum(row.parameters for row in result.sites)
    assert len(result.answers) == 3
    assert all(a.after == a.expected != a.before for a in result.answers)
    assert {"trainable", "gradients", "movement", "base", "supervision"} <= set(result.checks)
    assert result.checks["held-out"].startswith("the loss fell: ")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"adapter_config.json", "adapter_model.safetensors", "deltaw.json", "train_config.json",
                       "train_choices.json", "metrics.jsonl", "train_result.json", "checkpoints"}
    assert json.loads((tmp_path / "out" / "train_result.json").read_text()) == json.loads(json.dumps(result.to_dict()))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "60/60" in shown.err
    assert "exact_match" in shown.err
    assert "peak memory" in shown.err


def test_the_saved_adapter_gives_the_figures_of_the_run(config: Callable[..., deltaw.TrainConfig],
                                                        tmp_path: Path) -> None:
    result = deltaw.train(config(valid=0.25), quiet=True)
    adapter = deltaw.load(tmp_path / "out")
    facts = adapter.facts["training"]
    assert (facts["steps"], facts["after"]) == (8, result.after)
    assert adapter.facts["base_model"] == result.base
    assert adapter.config.task_type == "CAUSAL_LM"
    base = load_base(result.base, dtype="fp32")
    deltaw.attach(base.model, adapter)
    from deltaw.train.examples import load_examples

    examples = load_examples(config(valid=0.25))[1]
    again = evaluate(base.model, base.tokenizer, examples.valid, rows=examples.valid_rows)
    assert again.loss == pytest.approx(result.after["loss"], rel=1e-6)


def test_the_best_step_is_what_is_saved(config: Callable[..., deltaw.TrainConfig], tmp_path: Path) -> None:
    values = iter([0.0, 0.1, 0.9, 0.2, 0.3, 0.0])

    def peaking(predictions: Any, references: Any) -> float:
        return next(values)

    result = deltaw.train(config(max_steps=12, metrics=peaking, keep_best="peaking", samples=0), quiet=True)
    held = {row["step"]: row["loss"] for row in read_metrics(tmp_path / "out" / "metrics.jsonl")
            if row["event"] == "eval"}
    assert result.best_step == 6
    assert result.after["loss"] == pytest.approx(held[6], rel=1e-6)
    assert held[6] != pytest.approx(held[12], rel=1e-3)


def test_a_run_is_repeated_bit_for_bit(config: Callable[..., deltaw.TrainConfig], tmp_path: Path) -> None:
    before = torch.get_rng_state()
    for name in ("one", "two"):
        deltaw.train(config(out=str(tmp_path / name)), quiet=True)
        torch.rand(5)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    torch.set_rng_state(before)
    deltaw.train(config(out=str(tmp_path / "three")), quiet=True)
    assert torch.equal(torch.get_rng_state(), before)


KILLED = """
import json, os, signal, sys
import deltaw
from deltaw.train import progress, checkpoint

def die(): os.kill(os.getpid(), signal.SIGKILL)

where = sys.argv[2]
if where == "step":
    step = progress.MetricsLog.step
    def dying(self, state, **figures):
        step(self, state, **figures)
        if state.step == 5: die()
    progress.MetricsLog.step = dying
elif where == "half a line":
    step = progress.MetricsLog.step
    def dying(self, state, **figures):
        if state.step == 5:
            with self.path.open("a") as file: file.write('{"event": "step", "st')
            die()
        step(self, state, **figures)
    progress.MetricsLog.step = dying
else:
    from deltaw.store import atomic
    swap = atomic._swap
    def dying(new, target):
        if target.name == "step-00000006": die()
        swap(new, target)
    atomic._swap = dying
deltaw.train(deltaw.TrainConfig.from_dict(json.loads(sys.argv[1])), quiet=True)
"""


@pytest.mark.parametrize("where", ["step", "half a line", "saving"])
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(where: str, config: Callable[..., deltaw.TrainConfig],
                                                          tmp_path: Path, repo: Path) -> None:
    whole = deltaw.train(config(out=str(tmp_path / "whole")), quiet=True)
    options = json.dumps(config().to_dict())
    killed = subprocess.run([sys.executable, "-c", KILLED, options, where], cwd=repo, check=False,
                            env={**os.environ, "PYTHONPATH": str(repo)}, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
    with pytest.raises(ConfigError, match=r"holds a run that was not finished.*resume"):
        deltaw.train(config(), quiet=True)
    resumed = deltaw.train(config(resume=True), quiet=True)
    assert (resumed.before, resumed.after, resumed.best_step) == (whole.before, whole.after, whole.best_step)
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def interrupting(step: int, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = MetricsLog.step

    def watched(self: MetricsLog, state: Any, **figures: float) -> None:
        original(self, state, **figures)
        if state.step == step:
            for _ in range(times if times == 1 else times + 2):  # one that falls into a destructor is lost: again
                before = signal.getsignal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
                until = time.monotonic() + 5
                while signal.getsignal(signal.SIGINT) is before and time.monotonic() < until:
                    time.sleep(0.001)  # two signals that nobody has looked at yet are one

    monkeypatch.setattr(MetricsLog, "step", watched)


def test_the_first_interrupt_saves_and_the_run_can_go_on(config: Callable[..., deltaw.TrainConfig], tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    whole = deltaw.train(config(out=str(tmp_path / "whole"), save_every=0), quiet=True)
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patched:
        interrupting(4, 1, patched)
        with pytest.raises(TrainInterrupted, match=r"stopped at step 4, saved to .*; go on with resume") as caught:
            deltaw.train(config(save_every=0), quiet=True)
    assert isinstance(caught.value, KeyboardInterrupt)
    assert caught.value.checkpoint == tmp_path / "out" / "checkpoints" / "step-00000004"
    assert signal.getsignal(signal.SIGINT) == before
    assert deltaw.train(config(save_every=0, resume=True), quiet=True).after == whole.after
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")


def test_the_second_interrupt_ends_at_once(config: Callable[..., deltaw.TrainConfig], tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    interrupting(4, 2, monkeypatch)
    with pytest.raises(KeyboardInterrupt) as caught:
        deltaw.train(config(save_every=0), quiet=True)
    assert not isinstance(caught.value, TrainInterrupted)
    assert not list((tmp_path / "out" / "checkpoints").glob("*"))


def test_a_run_in_the_background_of_a_shell_goes_on(config: Callable[..., deltaw.TrainConfig],
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        original = MetricsLog.step

        def watched(self: MetricsLog, state: Any, **figures: float) -> None:
            signal.raise_signal(signal.SIGINT)
            original(self, state, **figures)

        monkeypatch.setattr(MetricsLog, "step", watched)
        deltaw.train(config(save_every=0), quiet=True)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_resuming_with_another_config_or_other_data_names_what_changed(
        config: Callable[..., deltaw.TrainConfig], tmp_path: Path, color_rows: Path) -> None:
    deltaw.train(config(), quiet=True)
    with pytest.raises(ConfigError) as caught:
        deltaw.train(config(resume=True, learning_rate=1e-3, lora=deltaw.LoraConfig(r=2)), quiet=True)
    text = str(caught.value)
    assert "TrainConfig.learning_rate: got 0.001; expected 0.01" in text
    assert "TrainConfig.lora.r: got 2; expected 4" in text
    assert "TrainConfig.lora.lora_dropout: got 0.0; expected 0.2" in text
    copied = tmp_path / "rows.jsonl"
    copied.write_text(color_rows.read_text())
    deltaw.train(config(out=str(tmp_path / "two"), data=str(copied)), quiet=True)
    copied.write_text(color_rows.read_text().replace("red1", "red9"))
    with pytest.raises(ConfigError, match="holds other data; expected that of the run's beginning"):
        deltaw.train(config(out=str(tmp_path / "two"), data=str(copied), resume=True), quiet=True)


def test_resuming_a_finished_run_changes_nothing(config: Callable[..., deltaw.TrainConfig], tmp_path: Path) -> None:
    first = deltaw.train(config(save_every=4), quiet=True)
    weights = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    again = deltaw.train(config(save_every=4, resume=True), quiet=True)
    assert (again.steps, again.before, again.after) == (8, first.before, first.after)
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == weights


def test_a_finished_folder_can_be_trained_into_anew(config: Callable[..., deltaw.TrainConfig], tmp_path: Path) -> None:
    deltaw.train(config(max_steps=9), quiet=True)
    deltaw.train(config(max_steps=3), quiet=True)
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-00000003"]
    assert max(row["step"] for row in read_metrics(tmp_path / "out" / "metrics.jsonl")) == 3


def test_early_stop(config: Callable[..., deltaw.TrainConfig]) -> None:
    values = iter([9.0, 1.0, 3.0, 2.0, 2.0, 2.0])

    def falling(predictions: Any, references: Any) -> float:
        return next(values)

    result = deltaw.train(config(max_steps=30, eval_every=1, metrics=falling, keep_best="falling", early_stop=2,
                                 samples=0), quiet=True)
    assert (result.steps, result.planned_steps, result.best_step) == (4, 30, 2)


def test_a_classifier_trains_its_head_too(config: Callable[..., deltaw.TrainConfig], tmp_path: Path) -> None:
    rows = [{"text": f"{'ab' if i % 2 else 'xy'}{i % 5}", "label": "low" if i % 2 else "high"} for i in range(40)]
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = deltaw.train(config(data=str(path), task="seq-cls", max_steps=30, metrics=("accuracy", "f1"), valid=0.25,
                                 lora=deltaw.LoraConfig(r=4)), quiet=True)
    assert result.after["accuracy"] == 1.0
    assert "score" in {row.site for row in result.sites if row.kind == "saved"}
    adapter = deltaw.load(tmp_path / "out")
    assert adapter.config.task_type == "SEQ_CLS"
    base = load_base(result.base, task="seq-cls", labels=("high", "low"), dtype="fp32")  # its own head is another one
    deltaw.attach(base.model, adapter)
    data = load_data(path, tokenizer=base.tokenizer, task="seq-cls")
    assert evaluate(base.model, base.tokenizer, data, metrics=("accuracy",)).metrics["accuracy"] > 0.95


@pytest.mark.parametrize("options", [
    {"gradient_checkpointing": True}, {"gradient_checkpointing": "attention"}, {"packing": "off"},
    {"packing": "off", "gradient_checkpointing": "attention"}, {"grad_accumulation": 2, "batch_size": 4},
    {"group_by_length": False}, {"batch_tokens": 90, "batch_size": 16}], ids=str)
def test_options_that_only_change_how_it_is_computed(options: Mapping[str, Any],
                                                     config: Callable[..., deltaw.TrainConfig], tmp_path: Path) -> None:
    result = deltaw.train(config(out=str(tmp_path / "other"), lora=deltaw.LoraConfig(r=4), **options), quiet=True)
    assert result.after["loss"] < result.before["loss"]
    if "packing" in options or "gradient_checkpointing" in options:
        plain = deltaw.train(config(lora=deltaw.LoraConfig(r=4)), quiet=True)
        assert [loss for *_, loss in losses(tmp_path / "other")] == pytest.approx(
            [loss for *_, loss in losses(tmp_path / "out")], rel=1e-5)
        assert plain.after["loss"] == pytest.approx(result.after["loss"], rel=1e-5)


def test_folders_as_data_and_a_valid_file(config: Callable[..., deltaw.TrainConfig], tmp_path: Path,
                                          color_rows: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    lines = color_rows.read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[:30]))
    (folder / "valid.jsonl").write_text("".join(lines[30:41]))
    result = deltaw.train(config(data=str(folder)), quiet=True)
    assert (result.data["train_rows"], result.data["valid_rows"]) == (30, 11)
    result = deltaw.train(config(data=str(folder / "train.jsonl"), valid=str(folder / "valid.jsonl"), eval_rows=4),
                          quiet=True)
    assert (result.data["train_rows"], result.data["valid_rows"]) == (30, 4)


def test_what_is_wrong_is_told_before_anything_is_written(config: Callable[..., deltaw.TrainConfig],
                                                          tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        deltaw.train(config(data=str(tmp_path / "rowz.jsonl")), quiet=True)
    with pytest.raises(deltaw.errors.TargetError, match=r"'q_porj' matches nothing.*q_proj"):
        deltaw.train(config(lora=deltaw.LoraConfig(target_modules=("q_porj",))), quiet=True)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ConfigError, match="is a file; expected a folder"):
        deltaw.train(config(), quiet=True)
    assert (tmp_path / "out").read_text() == "mine"


def test_a_run_that_the_doctor_stops_leaves_no_adapter(config: Callable[..., deltaw.TrainConfig], tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    from deltaw.train.objective import CausalLoss

    monkeypatch.setattr(CausalLoss, "loss", lambda self, model, batch: torch.zeros((), requires_grad=True) * 1.0)
    with pytest.raises(DoctorError, match="no tensor of the tuning got a gradient"):
        deltaw.train(config(), quiet=True)
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
