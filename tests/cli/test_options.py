"""Every field of a config can be set from the command line, to what was written, and from a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from deltaw.baselines.config import OPTIONS, BaselineConfig
from deltaw.cli import analyse as analyse_verb
from deltaw.cli import convert as convert_verb
from deltaw.cli import eval as eval_verb
from deltaw.cli import generate as generate_verb
from deltaw.cli import merge as merge_verb
from deltaw.cli import train as train_verb
from deltaw.cli.build import build
from deltaw.cli.options import field_docs, given, option_name
from deltaw.cli.parser import UsageError
from deltaw.cli.writing import Sampling
from deltaw.core import LoraConfig
from deltaw.train.config import TrainConfig

REQUIRED = ["--model", "m", "--data", "d", "--out", "o"]
TRAIN: dict[str, tuple[str, Any]] = {
    "model": ("other/base", "other/base"), "data": ("rows.csv", "rows.csv"), "out": ("there", "there"),
    "task": ("seq-cls", "seq-cls"), "method": ("bitfit", "bitfit"),
    "columns": ("prompt=question,completion=a=b", {"prompt": "question", "completion": "a=b"}),
    "max_length": ("77", 77), "train_on": ("all", "all"), "valid": ("0.25", 0.25), "name": ("sql", "sql"),
    "cache_data": ("no-", False), "epochs": ("2.5", 2.5), "max_steps": ("9", 9), "batch_size": ("3", 3),
    "group_by_length": ("no-", False),
    "grad_accumulation": ("4", 4), "learning_rate": ("1e-4", 1e-4), "schedule": ("cosine", "cosine"),
    "warmup_ratio": ("0.2", 0.2), "warmup_steps": ("5", 5), "weight_decay": ("0.01", 0.01),
    "betas": ("0.8,0.95", (0.8, 0.95)),
    "eps": ("1e-6", 1e-6), "max_grad_norm": ("0.5", 0.5), "device": ("cpu", "cpu"), "dtype": ("fp32", "fp32"),
    "batch_tokens": ("4096", 4096), "packing": ("off", "off"), "compile": ("on", "on"),
    "optimizer": ("adamw8bit", "adamw8bit"), "loraplus_lr_ratio": ("16", 16.0), "freeze_a": ("", True),
    "label_smoothing": ("0.1", 0.1), "z_loss": ("1e-4", 1e-4), "gradient_checkpointing": ("attention", "attention"),
    "quantize": ("fp4", "fp4"), "double_quant": ("no-", False), "plan": ("warn", "warn"),
    "quantize_tables": ("int8", "int8"),
    "release_memory": ("", True),
    "threads": ("2", 2), "seed": ("7", 7), "eval_every": ("11", 11),
    "eval_rows": ("none", None), "metrics": ("accuracy,f1", ("accuracy", "f1")), "max_new_tokens": ("12", 12),
    "samples": ("0", 0), "keep_best": ("none", None), "early_stop": ("2", 2), "save_every": ("6", 6),
    "keep_checkpoints": ("1", 1), "resume": ("", True), "doctor_steps": ("4", 4), "allow_unused": ("", True),
}
LORA: dict[str, tuple[str, Any]] = {
    "r": ("4", 4), "lora_alpha": ("8.5", 8.5), "lora_dropout": ("0.1", 0.1),
    "target_modules": ("q_proj,v_proj", ("q_proj", "v_proj")), "exclude_modules": ("re:.*lm_head", ".*lm_head"),
    "target_parameters": ("experts.gate,experts.up", ("experts.gate", "experts.up")),
    "target_slices": ("c_attn=q-v", {"c_attn": "q-v"}), "layers_to_transform": ("0,2", (0, 2)),
    "layers_pattern": ("layers,h", ("layers", "h")), "rank_pattern": ('{"q_proj|k{1,2}": 4, "v=": 2}',
                                                                      {"q_proj|k{1,2}": 4, "v=": 2}),
    "alpha_pattern": ("q_proj=4,v.*=8.5", {"q_proj": 4.0, "v.*": 8.5}), "use_rslora": ("", True),
    "bias": ("lora_only", "lora_only"), "modules_to_save": ("score", ("score",)),
    "init_lora_weights": ("pissa_niter_4", "pissa_niter_4"), "loftq_config": ("loftq_iter=5", {"loftq_iter": 5}),
    "task_type": ("CAUSAL_LM", "CAUSAL_LM"),
}
BASELINE: dict[str, tuple[str, Any]] = {
    "top_layers": ("3", 3), "prefix_tokens": ("16", 16), "infix_tokens": ("4", 4), "prefix_form": ("past", "past"),
    "prefix_hidden": ("512", 512), "bottleneck": ("16", 16), "activation": ("gelu", "gelu"), "train_norms": ("", True),
    "drop_layers": ("2", 2), "dimension": ("200", 200), "structure_aware": ("no-", False),
}
EVAL: dict[str, tuple[str, Any]] = {
    "model": ("b", "b"), "device": ("cpu", "cpu"), "dtype": ("fp16", "fp16"),
    "quantize": ("int8", "int8"), "double_quant": ("no-", False), "any_base": ("", True),
    "quantize_tables": ("int8", "int8"),
    "data": ("d", "d"), "adapter": ("a", "a"), "split": ("valid", "valid"), "columns": ("text=t", {"text": "t"}),
    "metrics": ("f1", ("f1",)), "max_length": ("9", 9), "train_on": ("all", "all"), "eval_rows": ("none", None),
    "batch_size": ("2", 2), "max_new_tokens": ("3", 3), "threads": ("1", 1), "labels": ("no,yes", ("no", "yes")),
}
GENERATE: dict[str, tuple[str, Any]] = {
    "model": ("b", "b"), "device": ("cpu", "cpu"), "dtype": ("bf16", "bf16"),
    "quantize": ("int8", "int8"), "double_quant": ("no-", False), "any_base": ("", True),
    "quantize_tables": ("int8", "int8"),
    "adapter": ("a", "a"), "system": ("Be brief.", "Be brief."), "template": ("none", "none"), "compare": ("", True),
}
SAMPLING: dict[str, tuple[str, Any]] = {
    "max_new_tokens": ("5", 5), "temperature": ("0.7", 0.7), "top_p": ("0.9", 0.9), "top_k": ("40", 40),
    "repetition_penalty": ("1.2", 1.2), "seed": ("3", 3), "num_beams": ("4", 4), "length_penalty": ("0.9", 0.9),
    "no_repeat_ngram_size": ("3", 3),
}
ANALYSE: dict[str, tuple[str, Any]] = {
    "model": ("b", "b"), "device": ("cpu", "cpu"), "dtype": ("fp32", "fp32"),
    "quantize": ("int8", "int8"), "double_quant": ("no-", False), "any_base": ("", True),
    "quantize_tables": ("int8", "int8"),
    "data": ("d.jsonl", "d.jsonl"), "eval_rows": ("7", 7), "max_length": ("64", 64),
    "sites": ("a.q,a.v", ("a.q", "a.v")), "top": ("5", 5), "epsilon": ("0.4", 0.4), "seed": ("3", 3),
    "out": ("page.html", "page.html"),
    "threads": ("2", 2),
}
MERGE: dict[str, tuple[str, Any]] = {
    "adapter": ("a", "a"), "out": ("o", "o"), "model": ("b", "b"), "dtype": ("bf16", "bf16"), "any_base": ("", True),
    "overwrite": ("", True), "into": ("requantized", "requantized"), "least_survival": ("0.9", 0.9),
    "force": ("", True),
}
CONVERT: dict[str, tuple[str, Any]] = {
    "to": ("peft", "peft"), "out": ("o", "o"), "model": ("b", "b"), "adapter": ("a", "a"), "dtype": ("q8_0", "q8_0"),
    "tokenizer": ("t.gguf", "t.gguf"), "modelfile": ("", True), "base_gguf": ("b.gguf", "b.gguf"),
    "overwrite": ("", True),
}


def written(field: str, text: str) -> list[str]:
    """The field as an option: with its value, or a switch alone."""
    option = option_name(field)
    return [option] if not text else [f"--{text}{option[2:]}"] if text == "no-" else [f"{option}={text}"]


_NEEDED = {"keep_best": ["--metrics", "accuracy"], "quantize_tables": ["--quantize", "nf4"]}
"""What an option is refused without."""


@pytest.mark.parametrize(("field", "text", "value"), [(f, *pair) for f, pair in TRAIN.items()])
def test_each_field_of_a_run(field: str, text: str, value: Any) -> None:
    more = _NEEDED.get(field, [])
    config = train_verb.config_of(train_verb.parser().parse([*REQUIRED, *more, *written(field, text)]))
    untouched = TrainConfig(model="m", data="d", out="o")
    assert getattr(config, field) == value != getattr(untouched, field)
    for other in fields(TrainConfig):
        if other.name != field and option_name(other.name) not in more:
            assert getattr(config, other.name) == getattr(untouched, other.name)


@pytest.mark.parametrize(("field", "text", "value"), [(f, *pair) for f, pair in LORA.items()])
def test_each_field_of_an_adapter(field: str, text: str, value: Any) -> None:
    lora = train_verb.config_of(train_verb.parser().parse([*REQUIRED, *written(field, text)])).lora
    assert getattr(lora, field) == value != getattr(LoraConfig(), field)
    for other in fields(LoraConfig):
        if other.name != field:
            assert getattr(lora, other.name) == getattr(LoraConfig(), other.name)


@pytest.mark.parametrize(("field", "text", "value"), [(f, *pair) for f, pair in BASELINE.items()])
def test_each_field_of_another_method(field: str, text: str, value: Any) -> None:
    method = [name for name, options in OPTIONS.items() if field in options][-1]
    more = ["--prefix-form", "past"] if field == "prefix_hidden" else []
    words = [*REQUIRED, "--method", method, *more, *written(field, text)]
    baseline = train_verb.config_of(train_verb.parser().parse(words)).baseline
    assert getattr(baseline, field) == value != getattr(BaselineConfig(), field)
    for other in fields(BaselineConfig):
        if other.name not in (field, "prefix_form"):
            assert getattr(baseline, other.name) == getattr(BaselineConfig(), other.name)


@pytest.mark.parametrize(("verb", "config", "values"), [
    (eval_verb, eval_verb.EvalOptions, EVAL), (generate_verb, generate_verb.GenerateOptions, GENERATE),
    (generate_verb, Sampling, SAMPLING), (merge_verb, merge_verb.MergeOptions, MERGE),
    (analyse_verb, analyse_verb.AnalyseOptions, ANALYSE), (convert_verb, convert_verb.ConvertOptions, CONVERT)])
def test_each_field_of_the_other_verbs(verb: Any, config: type, values: dict[str, tuple[str, Any]]) -> None:
    words = [word for field, (text, _) in values.items() for word in written(field, text)]
    made: Any = build(config, given(verb.parser().parse(words), config))
    for field, (_, value) in values.items():
        assert getattr(made, field) == value, field


def test_the_tables_above_hold_every_field() -> None:
    assert set(TRAIN) == {f.name for f in fields(TrainConfig)} - {"lora", "baseline"}
    assert set(BASELINE) == {f.name for f in fields(BaselineConfig)}
    assert set(LORA) == {f.name for f in fields(LoraConfig)}
    assert set(EVAL) == {f.name for f in fields(eval_verb.EvalOptions)}
    assert set(GENERATE) == {f.name for f in fields(generate_verb.GenerateOptions)}
    assert set(SAMPLING) == {f.name for f in fields(Sampling)}
    assert set(ANALYSE) == {f.name for f in fields(analyse_verb.AnalyseOptions)}
    assert set(MERGE) == {f.name for f in fields(merge_verb.MergeOptions)}
    assert set(CONVERT) == {f.name for f in fields(convert_verb.ConvertOptions)}


@pytest.mark.parametrize("config", [TrainConfig, LoraConfig, BaselineConfig, eval_verb.EvalOptions,
                                    generate_verb.GenerateOptions, Sampling, merge_verb.MergeOptions,
                                    analyse_verb.AnalyseOptions, convert_verb.ConvertOptions])
def test_every_field_is_documented_on_one_line(config: type) -> None:
    docs = field_docs(config)
    for field in fields(config):
        assert docs[field.name].endswith("."), field.name
        assert "\n" not in docs[field.name]


@pytest.mark.parametrize(("text", "value"), [
    ("all-linear", "all-linear"), ("q_proj", ("q_proj",)), ("re:.*\\.(q|v)_proj", ".*\\.(q|v)_proj"),
    ('["a,b"]', ("a,b",))])
def test_targets(text: str, value: Any) -> None:
    config = train_verb.config_of(train_verb.parser().parse([*REQUIRED, "--target-modules", text]))
    assert config.lora.target_modules == value


def test_an_option_may_be_written_like_its_field() -> None:
    config = train_verb.config_of(train_verb.parser().parse([*REQUIRED, "--lora_alpha", "3", "--no_group_by_length"]))
    assert config.lora.lora_alpha == 3
    assert not config.group_by_length


# ----------------------------------------------------------------------------------------------------------- a file

TOML = """
model = "m"
data = "d"
learning_rate = 1e-3
columns = { prompt = "q", completion = "a" }
[lora]
r = 2
target_modules = ["q_proj"]
"""


def test_a_file_gives_options_and_those_given_beside_it_count_more(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(TOML, encoding="utf-8")
    words = ["--config", str(file), "--out", "o", "--learning-rate", "2e-3", "--lora-alpha", "4"]
    config = train_verb.config_of(train_verb.parser().parse(words))
    assert (config.model, config.learning_rate, config.columns) == ("m", 2e-3, {"prompt": "q", "completion": "a"})
    assert (config.lora.r, config.lora.lora_alpha, config.lora.target_modules) == (2, 4, ("q_proj",))


def test_a_runs_own_config_file_gives_the_same_config(tmp_path: Path) -> None:
    words = [word for f, (text, _) in TRAIN.items() if f not in ("keep_best", "method") for word in written(f, text)]
    words += [word for f, (text, _) in LORA.items() for word in written(f, text)]
    config = train_verb.config_of(train_verb.parser().parse(words))
    file = tmp_path / "train_config.json"
    file.write_text(json.dumps(config.to_dict()), encoding="utf-8")
    assert train_verb.config_of(train_verb.parser().parse(["--config", str(file)])) == config


@pytest.mark.parametrize(("name", "content", "said"), [
    ("a.json", '{"model": "m", "data": "d", "out": "o", "lerning_rate": 1}', "--lerning-rate: is unknown; expected an "
     "option of TrainConfig. Did you mean learning_rate"),
    ("a.json", '{"model": "m", "data": "d", "out": "o", "r": 4}', "--r: is an option of the adapter; expected it in"),
    ("a.json", '{"lora": {"rr": 4}, "model": "m", "data": "d", "out": "o"}', "is unknown"),
    ("a.json", '{"lora": 4}', "lora is 4; expected an object"), ("a.json", "[1]", "holds a list"),
    ("a.json", "{", "does not parse"), ("a.toml", "a = ", "does not parse"), ("a.yaml", "a: 1", "unknown format"),
    ("a.json", '{"model": "m", "data": "d", "out": "o", "batch_size": "8"}', "--batch-size: got '8'"),
    ("a.json", '{"model": "m", "data": "d", "out": "o", "lora": {"target_modules": 5}}', "wrong type"),
])
def test_a_file_that_cannot_be_used(name: str, content: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        train_verb.config_of(train_verb.parser().parse(["--config", str(file)]))
    assert said in str(caught.value)


def test_an_absent_file(deltaw: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, out, err = deltaw("train", "--config", tmp_path / "absent.json")
    assert (code, out) == (2, "")
    assert "absent.json' cannot be read (No such file or directory)" in err
