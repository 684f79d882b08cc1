"""The config says everything that is wrong with it, at once; what it is, it is for good."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from deltaw import LoraConfig, TrainConfig
from deltaw.errors import ConfigError

NEEDED = {"model": "base", "data": "rows.jsonl", "out": "adapter"}


def made(**options: Any) -> TrainConfig:
    return TrainConfig(**{**NEEDED, **options})


def half(predictions: Any, references: Any) -> float:
    return 0.5


WRONG = {
    "model": "", "data": 3, "out": "", "task": "seq_cls", "columns": "prompt", "max_length": 0, "train_on": "answers",
    "valid": 1.0,
    "method": "bitfitt", "lora": 8, "baseline": 4, "name": "", "epochs": 0, "max_steps": -1, "batch_size": 0,
    "group_by_length": 1,
    "grad_accumulation": True, "learning_rate": float("nan"), "schedule": "cosin", "warmup_ratio": 1.0,
    "warmup_steps": -1, "weight_decay": -0.1, "betas": (0.9, 1.0), "eps": 0, "max_grad_norm": -1, "device": "gpu0x",
    "dtype": "fp16", "cache_data": "no", "quantize": "nf5", "double_quant": "no", "quantize_tables": "nf4",
    "plan": "maybe",
    "batch_tokens": 0, "packing": True, "compile": "yes", "optimizer": "sgd", "loraplus_lr_ratio": 0, "freeze_a": "yes",
    "label_smoothing": 1.0, "z_loss": -1, "gradient_checkpointing": "yes", "release_memory": 1,
    "threads": 0, "seed": -1, "eval_every": -1, "eval_rows": 0,
    "metrics": ("blue",), "max_new_tokens": 0, "samples": -1, "keep_best": "f1", "early_stop": 0, "save_every": -1,
    "keep_checkpoints": 0, "resume": "latest", "doctor_steps": 1, "allow_unused": None,
}


def test_every_field_is_checked() -> None:
    assert set(WRONG) == {f.name for f in dataclasses.fields(TrainConfig)}


@pytest.mark.parametrize("name", sorted(WRONG))
def test_a_wrong_value_is_named(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        made(**{name: WRONG[name]})
    assert f"TrainConfig.{name}" in {str(fault).split(":")[0] for fault in caught.value.faults}


def test_all_faults_are_raised_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**WRONG)
    named = {str(fault).split(":")[0].removeprefix("TrainConfig.") for fault in caught.value.faults}
    assert named == set(WRONG)


def test_near_words_are_suggested() -> None:
    with pytest.raises(ConfigError, match=r"task: got 'seq_cls'; expected one of .*Did you mean seq-cls\?"):
        made(task="seq_cls")
    with pytest.raises(ConfigError, match=r"metrics: got 'exact'; .*Did you mean exact_match\?"):
        made(metrics="exact")


def test_unknown_and_missing_keys_are_refused_with_near_matches() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_dict({"model": "m", "data": "d", "learnig_rate": 1, "r": 8})
    text = str(caught.value)
    assert "'learnig_rate': is unknown; expected an option of TrainConfig. Did you mean learning_rate" in text
    assert "'r': is an option of the adapter; expected it inside 'lora'" in text
    assert "'out': is missing" in text


def test_faults_of_the_adapters_config_are_among_them() -> None:
    with pytest.raises(ConfigError) as caught:
        made(lora={"r": 0}, epochs=0)
    assert "LoraConfig.r: got 0" in str(caught.value)
    assert "TrainConfig.epochs: got 0" in str(caught.value)


def test_it_survives_json() -> None:
    config = made(lora=LoraConfig(r=4, target_modules=("q_proj",)), metrics=("f1",), betas=(0.8, 0.9), valid=0.2,
                  columns={"prompt": "question"}, keep_best="f1")
    again = TrainConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.lora.target_modules == ("q_proj",)


def test_one_metric_needs_no_tuple_and_a_function_goes_by_its_name() -> None:
    config = made(metrics=half, keep_best="half")
    assert config.metrics == (half,)
    assert config.to_dict()["metrics"] == ["half"]


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        made().epochs = 2  # type: ignore[misc]


def test_what_may_and_may_not_change_on_resumption() -> None:
    recorded = json.loads(json.dumps(made(lora=LoraConfig(r=4)).to_dict()))
    assert made(lora=LoraConfig(r=4), resume=True, threads=2, samples=0, cache_data=False).changes(recorded) == []
    changed = [str(fault) for fault in made(lora=LoraConfig(r=8), learning_rate=1e-3).changes(recorded)]
    assert changed == ["TrainConfig.lora.r: got 8; expected 4, as when the run began",
                       "TrainConfig.learning_rate: got 0.001; expected 0.0005, as when the run began"]


def test_each_field_has_a_line_of_documentation() -> None:
    import ast
    import inspect

    from deltaw.train import config as module

    body = next(node.body for node in ast.parse(inspect.getsource(module)).body
                if isinstance(node, ast.ClassDef) and node.name == "TrainConfig")
    for i, node in enumerate(body):
        if isinstance(node, ast.AnnAssign):
            after = body[i + 1]
            assert isinstance(after, ast.Expr), ast.unparse(node.target)
            assert isinstance(after.value, ast.Constant), ast.unparse(node.target)
