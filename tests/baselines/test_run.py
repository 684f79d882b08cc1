"""Whole runs: every method from files to files through `deltaw.train`, stopped and resumed, evaluated and asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import deltaw
from deltaw import baselines
from deltaw.baselines import BaselineConfig
from deltaw.cli.main import main
from deltaw.errors import ConfigError, TargetError
from deltaw.train.progress import MetricsLog, read_metrics
from tests.baselines.conftest import OPTIONS, build
from tests.train.conftest import character_tokenizer

WORDS = {"llama": "causal-lm", "gpt2": "causal-lm", "bert": "seq-cls"}
PAST = {"prefix_form": "past", "prefix_tokens": 3, "prefix_hidden": 5, "infix_tokens": 0}
QUICK = ("bitfit", "preembed", "adapter-h", "lora+pl")
CASES = [("full", "llama", {}), ("ft-top-k", "gpt2", {}), ("head", "bert", {}), ("bitfit", "gpt2", {}),
         ("bitfit", "bert", {}), ("preembed", "llama", {}), ("preembed", "bert", {}), ("prelayer", "gpt2", {}),
         ("prelayer", "llama", PAST), ("adapter-h", "bert", {}), ("adapter-l", "llama", {}), ("adapter-p", "bert", {}),
         ("adapter-d", "gpt2", {}), ("lora+pe", "llama", {}), ("lora+pl", "gpt2", {}), ("subspace", "bert", {}),
         ("subspace", "llama", {"structure_aware": False})]


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with a base of each family, and a file of rows for each task."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    made = {family: tmp_path_factory.mktemp(family) for family in WORDS}
    tokenizer = character_tokenizer()
    for family, folder in made.items():
        build(family, vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    data = tmp_path_factory.mktemp("data")
    made |= {"causal-lm": data / "answers.jsonl", "seq-cls": data / "labels.jsonl"}
    words = ["red", "blue", "green"]
    made["causal-lm"].write_text("".join(json.dumps({"prompt": f"{words[i % 3]}{i}:", "completion": words[i % 3][0]})
                                         + "\n" for i in range(24)))
    made["seq-cls"].write_text("".join(json.dumps({"text": f"{words[i % 3]} {i}", "label": words[i % 3]}) + "\n"
                                       for i in range(24)))
    return made


@pytest.fixture
def config(places: dict[str, Path], tmp_path: Path) -> Callable[..., deltaw.TrainConfig]:
    def make(method: str, family: str, extra: dict[str, Any] | None = None, **options: Any) -> deltaw.TrainConfig:
        own = {**OPTIONS.get(method, {}), **(extra or {})}
        defaults: dict[str, Any] = {
            "model": str(places[family]), "data": str(places[WORDS[family]]), "task": WORDS[family], "dtype": "fp32",
            "out": str(tmp_path / "out"), "max_steps": 6, "batch_size": 4, "learning_rate": 1e-2, "eval_every": 3,
            "eval_rows": 2, "samples": 1, "max_new_tokens": 2, "method": method, "baseline": BaselineConfig(**own)}
        return deltaw.TrainConfig(**{**defaults, **options})

    return make


class Stopped(Exception):
    pass


@pytest.mark.parametrize(("method", "family", "extra"), [
    pytest.param(*case, marks=() if (case[0] in QUICK and case[1] != "bert") or case[0] == "adapter-h"
                 else pytest.mark.slow) for case in CASES])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(method: str, family: str, extra: dict[str, Any],
                                                         config: Callable[..., deltaw.TrainConfig], tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    whole = deltaw.train(config(method, family, extra, out=str(tmp_path / "whole")), quiet=True)
    step = MetricsLog.step

    def stopping(self: MetricsLog, state: Any, **figures: float) -> None:
        step(self, state, **figures)
        if state.step == 5:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "step", stopping)
        with pytest.raises(Stopped):
            deltaw.train(config(method, family, extra), quiet=True)
    again = deltaw.train(config(method, family, extra, resume=True), quiet=True)
    assert (again.before, again.after, again.best_step) == (whole.before, whole.after, whole.best_step)
    curves = [list(read_metrics(tmp_path / name / "metrics.jsonl")) for name in ("out", "whole")]
    assert [row["loss"] for row in curves[0]] == [row["loss"] for row in curves[1]]
    saved = baselines.read(tmp_path / "out")
    for name in {"tuning.safetensors", "adapter_model.safetensors"} & {p.name for p in (tmp_path / "out").iterdir()}:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert saved.recipe.method == method
    assert whole.checks["base"].endswith("have the bits they had before")
    assert whole.adapter_bytes > 0
    assert whole.before != whole.after
    assert "packing: off" in whole.checks.get("computed", "") or baselines.virtual_tokens(
        method, saved.config) == 0 or family == "bert"


def test_a_method_that_cannot_apply_is_refused_before_training(config: Callable[..., deltaw.TrainConfig],
                                                               tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="has no bias vectors"):
        deltaw.train(config("bitfit", "llama"), quiet=True)
    assert not (tmp_path / "out").exists()


def test_options_of_one_method_are_no_options_of_another(config: Callable[..., deltaw.TrainConfig]) -> None:
    with pytest.raises(ConfigError) as caught:
        config("bitfit", "gpt2", {"bottleneck": 3}, lora=deltaw.LoraConfig(r=3), freeze_a=True)
    assert [fault.where for fault in caught.value.faults] == ["BaselineConfig.bottleneck", "TrainConfig.lora",
                                                              "TrainConfig.freeze_a"]
    with pytest.raises(ConfigError, match=r"method.*Did you mean bitfit"):
        config("bitfitt", "gpt2")
    with pytest.raises(ConfigError, match="would lose the prefix"):
        config("prelayer", "llama", PAST, gradient_checkpointing="layer")


@pytest.mark.parametrize(("method", "family"), [
    ("prelayer", "llama"), pytest.param("adapter-h", "gpt2", marks=pytest.mark.slow),
    pytest.param("preembed", "gpt2", marks=pytest.mark.slow)])
def test_gradient_checkpointing_changes_nothing(method: str, family: str, config: Callable[..., deltaw.TrainConfig],
                                                tmp_path: Path) -> None:
    found = [deltaw.train(config(method, family, out=str(tmp_path / mode), gradient_checkpointing=mode, samples=0,
                                 max_steps=3), quiet=True) for mode in ("off", "layer")]
    assert found[0].after["loss"] == pytest.approx(found[1].after["loss"], rel=1e-5)


@pytest.mark.parametrize(("method", "family"), [
    ("prelayer", "llama"), pytest.param("bitfit", "bert", marks=pytest.mark.slow),
    pytest.param("bitfit", "gpt2", marks=pytest.mark.slow)])
def test_the_command_line_trains_measures_and_answers(method: str, family: str, places: dict[str, Path],
                                                      tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, data = str(tmp_path / "out"), str(places[WORDS[family]])
    tokens = ["--prefix-tokens", "2", "--infix-tokens", "1"] if method == "prelayer" else []
    assert main(["train", "--model", str(places[family]), "--data", data, "--task", WORDS[family], "--out", out,
                 "--method", method, "--max-steps", "4", "--learning-rate", "0.02", "--dtype", "fp32", "--eval-rows",
                 "4", "--json", "--no-report", *tokens]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["trained_parameters"] == sum(row["parameters"] for row in result["sites"])
    assert main(["eval", "--adapter", out, "--data", data, "--eval-rows", "4", "--dtype", "fp32", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["adapter_figures"]["loss"] != figures["base_figures"]["loss"]
    asked = main(["generate", "--adapter", out, "--max-new-tokens", "2", "--json", "--compare", "red1:"])
    answered = capsys.readouterr()
    if family == "bert":
        assert asked == 1
        assert "was trained to choose labels" in answered.err
    else:
        assert set(json.loads(answered.out)["answers"][0]) == {"prompt", "base", "answer"}
        assert main(["merge", "--adapter", out, "--out", str(tmp_path / "merged")]) == 1
        assert f"was trained with method {method}" in capsys.readouterr().err


def test_one_folder_holds_one_method(config: Callable[..., deltaw.TrainConfig], tmp_path: Path) -> None:
    for method in ("bitfit", "lora", "adapter-h"):
        deltaw.train(config(method, "gpt2", max_steps=2, samples=0, eval_every=0), quiet=True)
        assert baselines.is_baseline(tmp_path / "out") == (method != "lora")
    assert not (tmp_path / "out" / "adapter_config.json").exists()
