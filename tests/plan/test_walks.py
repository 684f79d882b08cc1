"""Answers that are kept: the same to the last bit as new ones, never of another question, and no harm where damaged."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import deltaw.plan.walks as walks
from deltaw.core import LoraConfig
from deltaw.plan import PlanConfig, kept, plan
from deltaw.plan.architectures import ARCHITECTURES
from deltaw.plan.found import Point, Step
from deltaw.plan.shapes import read_shapes
from deltaw.plan.survey import Survey


@pytest.fixture
def config(tiny_llama: Callable[..., Any], tmp_path: Path) -> PlanConfig:
    """A folder's small base, planned for a card that it does not quite fit, so that changes are looked for."""
    tiny_llama(num_hidden_layers=3).save_pretrained(tmp_path / "base")
    return PlanConfig(model=str(tmp_path / "base"), device="t4", memory="851MB", batch_size=64, max_length=64,
                      methods=("full", "lora", "qlora"))


def new(config: PlanConfig, *, search: bool = True) -> str:
    """The plan with nothing recalled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walks, "recall", lambda *_: None)
        patch.setattr(walks, "recall_shipped", lambda *_: None)
        return said(config, search=search)


def said(config: PlanConfig, *, search: bool = True) -> str:
    return json.dumps(plan(config, search=search).to_dict())


def refuse(*_: object) -> None:
    raise AssertionError("it was laid out again")


def test_a_second_plan_is_the_same_and_lays_nothing_out(config: PlanConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = said(config)
    assert first == new(config)
    monkeypatch.setattr(walks.Walks, "_survey", property(refuse))
    assert said(config) == first
    other = replace(config, memory="40GB", device="a100", dtype="fp16", rows=1000, adapters=3)
    assert json.loads(said(other))["methods"][1]["sites"] == json.loads(first)["methods"][1]["sites"]
    with pytest.raises(AssertionError, match="laid out again"):
        said(replace(config, batch_size=63))


@pytest.mark.parametrize("changed", [
    {"supervised": 0.4}, {"packing": "off"}, {"dtype": "fp32"}, {"gradient_checkpointing": "attention"},
    {"lora": LoraConfig(target_modules=["q_proj"])}, {"task": "seq-cls", "num_labels": 7}], ids="-".join)
def test_no_answer_is_given_to_another_question(changed: dict[str, Any], config: PlanConfig) -> None:
    config = replace(config, methods=("lora",))
    other = replace(config, **changed)
    first, again = said(config, search=False), said(other, search=False)
    assert again == new(other, search=False)
    assert json.loads(again)["methods"] != json.loads(first)["methods"]


def test_a_changed_config_is_another_base(config: PlanConfig) -> None:
    first = said(config, search=False)
    file = Path(config.model, "config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "intermediate_size": 200}))
    assert said(config, search=False) == new(config, search=False) != first


@pytest.mark.parametrize("damage", ["", "a digit", "versions", "form"])
def test_damaged_and_foreign_answers_are_found_anew_and_written_again(damage: str, config: PlanConfig) -> None:
    config = replace(config, methods=("lora",))
    first = said(config, search=False)
    files = {file: file.read_text() for file in kept.folder().iterdir()}
    assert len(files) == 3  # network, sites, a step
    for file, text in files.items():
        facts = json.loads(text)
        if damage == "a digit":
            facts["answer"] = json.loads(json.dumps(facts["answer"]).replace("1", "2"))
        elif damage in ("versions", "form"):  # whole, but not of these libraries, or not what is read here
            facts.pop("check")
            facts |= {"by": {"torch": "1.0"}} if damage == "versions" else {"answer": [1]}
            facts["check"] = kept._check(facts)
        file.write_text(json.dumps(facts) if len(damage) > 2 else damage)
    assert said(config, search=False) == first
    assert {file: file.read_text() for file in kept.folder().iterdir()} == files


def test_a_home_that_cannot_be_written_does_no_harm(config: PlanConfig, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    first = said(config, search=False)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DELTAW_HOME", str(tmp_path / "file"))
    assert said(config, search=False) == first


def test_no_more_answers_are_kept_than_there_is_room_for(config: PlanConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "MOST", 2)
    first = said(config, search=False)
    assert len(list(kept.folder().iterdir())) == 2
    assert said(config, search=False) == first


def test_a_rank_that_is_of_no_use_is_told_each_time(config: PlanConfig) -> None:
    for _ in range(2):
        with pytest.warns(UserWarning, match="exceeds min"):
            plan(replace(config, methods=("lora",), lora=LoraConfig(r=4, rank_pattern={"0.self_attn.k_proj": 500})))


@pytest.mark.parametrize("options", [
    [], ["--batch-size", "3", "--max-length", "5000", "--r", "32", "--supervised", "0.3"]], ids=["plain", "otherwise"])
def test_a_published_shape_needs_neither_torch_nor_transformers_nor_a_home(options: list[str]) -> None:
    if not kept.shipped("llama3-70b"):
        pytest.skip("the package's answers are of other versions of torch or transformers")
    code = ("import sys; from deltaw.cli.main import main; "
            f"assert main(['plan', '--model', 'llama3-70b', '--device', 'h100', '--json', *{options}]) == 0; "
            "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["parameters"] == 70_553_706_496
    assert not kept.folder().exists()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_the_package_says_of_a_shape_is_what_is_found(name: str) -> None:
    """Of each shape its sizes and its sites, of some a step; `python docs/write_walked.py` writes them."""
    if not kept.shipped(name):
        pytest.skip("the package's answers are of other versions of torch or transformers")
    task = "seq-cls" if name.startswith("deberta") else "causal-lm"
    config, shapes = PlanConfig(model=name, task=task), read_shapes(name, task=task)
    asked, survey = walks.Walks(shapes, config, "bfloat16"), Survey(shapes, "bfloat16")
    assert asked.network == survey.network()
    assert list(asked.places) == survey.places(config)
    if name in ("gpt3-175b", "llama3-70b", "mistral-7b", "roberta-large"):
        assert asked.at("lora", 8, 1024) == survey.step(config, Point("lora", 8, 1024, 8))
    assert "_survey" not in asked.__dict__


def test_answers_are_read_as_they_were_written() -> None:
    step = Survey(read_shapes("smollm2-135m"), "float32").step(PlanConfig(model="smollm2-135m", max_length=9),
                                                              Point("lora", 1, 9, 8))
    again = Step.from_json(json.loads(json.dumps(step.to_json())))
    assert again == step
    assert list(again.work.products.items()) == list(step.work.products.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama3-70b"])
def test_every_answer_of_the_package_is_what_is_found(name: str, repo: Path) -> None:
    if not kept.shipped(name):
        pytest.skip("the package's answers are of other versions of torch or transformers")
    import importlib.util

    spec = importlib.util.spec_from_file_location("write_walked", repo / "docs" / "write_walked.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.walked(name) == kept.shipped(name)
