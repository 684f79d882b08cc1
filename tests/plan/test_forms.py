"""A form says what a walk says, at points that it was not found from, to the last bit; and nothing beyond its range."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import deltaw.plan.walks as walks
from deltaw.core import LoraConfig
from deltaw.plan import PlanConfig, kept, plan
from deltaw.plan.config import Method
from deltaw.plan.fitted import find_forms
from deltaw.plan.forms import At, Form
from deltaw.plan.found import Point, Step, Work
from deltaw.plan.shapes import read_shapes
from deltaw.plan.step import Heard, Steps
from deltaw.plan.walks import Walks

MODEL = PlanConfig(model="llama3-70b", device="h100", methods=("full", "lora", "qlora"))
# Batch, length, rank and share of supervised tokens; some make sizes of a batch and of a layer the same by chance.
POINTS = [(1, 1000, 8, 1.0), (2, 4094, 3, 0.3), (5, 512, 32, 1.0), (32, 24, 8, 0.9), (64, 128, 16, 0.01),
          (1, 2, 1, 1.0)]


def formed(config: PlanConfig, method: Method, dtype: str, *, kernels: bool = False) -> Step | None:
    if not kept.shipped(config.model):
        pytest.skip("the package's answers are of other versions of torch or transformers")
    point = Point.of(method, config.batch_size, config.max_length, config.lora.r)
    return Walks(read_shapes(config.model, task=config.task), config, dtype)._formed(point, kernels=kernels)


def ordered(work: Work) -> object:
    return [list(products.items()) for products in work.all_products], work.attention, work.moved, work.calls, \
        work.passes, work.drawn


@pytest.mark.parametrize("mode", ["off", "layer"])
@pytest.mark.parametrize(("model", "method", "dtype"), [
    ("llama3-70b", "lora", "bfloat16"), ("llama3-70b", "full", "bfloat16"), ("llama3-70b", "lora", "float32"),
    ("smollm2-135m", "bitfit", "float32"), ("mistral-7b", "lora", "bfloat16"), ("gpt2", "preembed", "float32")])
@pytest.mark.parametrize("at", POINTS, ids=str)
def test_a_form_says_what_a_walk_says(model: str, method: Method, dtype: str, mode: str,
                                      at: tuple[int, int, int, float]) -> None:
    batch, length, rank, supervised = at
    config = PlanConfig(model=model, batch_size=batch, max_length=length, supervised=supervised,
                        lora=LoraConfig(r=rank, lora_alpha=5), gradient_checkpointing=mode)  # type: ignore[arg-type]
    found = formed(config, method, dtype)
    expected = Steps(read_shapes(model), config, getattr(torch, dtype)).at(method, batch, length)
    assert found == expected
    assert found is not None
    assert ordered(found.work) == ordered(expected.work)
    assert ordered(found.forward_work) == ordered(expected.forward_work)


@pytest.mark.parametrize("mode", ["off", "layer"])
@pytest.mark.parametrize(("model", "method", "task"), [
    ("llama3-70b", "lora", "causal-lm"), ("smollm2-135m", "full", "causal-lm"), ("gpt2-large", "lora", "causal-lm"),
    ("bert-base", "lora", "seq-cls")])
@pytest.mark.parametrize("at", [(2, 400, 3, 0.3), (5, 512, 32, 1.0), (1, 2, 1, 1.0)], ids=str)
def test_a_form_says_what_a_walk_on_kernels_says(model: str, method: Method, task: str, mode: str,
                                                 at: tuple[int, int, int, float]) -> None:
    batch, length, rank, supervised = at
    config = replace(PlanConfig(model=model, batch_size=batch, max_length=length, supervised=supervised),
                     task=task, lora=LoraConfig(r=rank), gradient_checkpointing=mode)  # type: ignore[arg-type]
    found = formed(config, method, "bfloat16", kernels=True)
    expected = Steps(read_shapes(model, task=task), config, torch.bfloat16, kernels=True).at(method, batch, length)
    assert found is not None
    assert ordered(found.work) == ordered(expected.work)
    assert bool(found.work.narrow) == (method == "lora")


@pytest.mark.parametrize("mode", ["off", "layer"])
@pytest.mark.parametrize("task", ["causal-lm", "seq-cls"])
@pytest.mark.parametrize(("batch", "length", "rank"), [(1, 100, 8), (1, 2, 16), (2, 511, 1), (6, 333, 40), (8, 8, 8)])
def test_a_classifier_has_a_form_of_its_own_for_one_example(task: str, mode: str, batch: int, length: int,
                                                            rank: int) -> None:
    config = PlanConfig(model="roberta-base", task=task, batch_size=batch, max_length=length,  # type: ignore[arg-type]
                        lora=LoraConfig(r=rank), gradient_checkpointing=mode)  # type: ignore[arg-type]
    expected = Steps(read_shapes("roberta-base", task=task), config, torch.bfloat16).at("lora", batch, length)
    assert formed(config, "lora", "bfloat16") == expected


def test_a_plan_by_forms_is_the_plan_that_a_walk_gives() -> None:
    config = replace(MODEL, batch_size=5, max_length=700, supervised=0.4, lora=LoraConfig(r=24), memory="200GB")
    assert formed(config, "lora", "bfloat16") is not None
    by_forms = json.dumps(plan(config).to_dict())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walks, "recall_shipped", lambda *_: None)
        patch.setattr(walks, "recall", lambda *_: None)
        assert json.dumps(plan(config).to_dict()) == by_forms


@pytest.mark.parametrize("changed", [
    {"lora": LoraConfig(r=300)}, {"lora": LoraConfig(target_modules=["q_proj"])},
    {"lora": LoraConfig(lora_dropout=0.1)}, {"lora": LoraConfig(rank_pattern={"q_proj": 4})}, {"packing": "off"},
    {"gradient_checkpointing": "attention"}], ids=str)
def test_what_no_form_covers_is_walked(changed: dict[str, object]) -> None:
    config = replace(MODEL, **changed)  # type: ignore[arg-type]
    assert formed(config, "lora", "bfloat16") is None
    walked = Walks(read_shapes(MODEL.model), config, "bfloat16")
    expected = Steps(walked.shapes, config, torch.bfloat16).at("lora", 2, 64)
    assert walked.at("lora", 2, 64) == expected
    assert list(walked.places) == walked._survey.places(config)


def test_beyond_a_window_of_attention_there_is_no_form() -> None:
    config = PlanConfig(model="mistral-7b", batch_size=1, max_length=4095)
    assert formed(config, "lora", "bfloat16") is not None
    assert formed(replace(config, max_length=4096), "lora", "bfloat16") is None


def heard(at: At, *, kept: int, peaks: list[int]) -> Heard:
    work = Work(calls=3.0)
    work.products[1, at.B * at.T, 640, 320] = 2
    return Heard(Step(kept=kept, over=max(peaks), forward=1.0, work=work, forward_work=work), peaks, [1])


def test_a_form_is_found_of_a_step_with_a_moment_for_each_example() -> None:
    def look(at: At) -> Heard:
        each = [i * at.T * 8 + 40 * at.T for i in range(at.B)]
        return heard(at, kept=at.B * at.T * 6 + at.B * at.T * at.T + at.S, peaks=[9000, *each, at.r * at.T])

    forms = find_forms(look, ranked=True, learned=True)
    assert [form.least for form in forms] == [[1, 2, 1]]
    for at in (At(1, 30, 4, 7), At(5, 999, 200, 4000), At(80, 3, 60, 1)):
        assert Form.from_json(json.loads(json.dumps(forms[0].to_json()))).step(at) == look(at).step


@pytest.mark.parametrize("sizes", ["odd", "one by one"])
def test_a_step_that_no_polynomial_describes_has_no_form(sizes: str) -> None:
    def look(at: At) -> Heard:
        return heard(at, kept=at.T // 7 if sizes == "odd" else at.T, peaks=[at.T] * (at.T if sizes != "odd" else 1))

    assert find_forms(look, ranked=False, learned=True) == []
