"""A method's folder: what comes back is what was saved, PEFT reads what it has too, and nothing wrong is taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deltaw import baselines
from deltaw.baselines import METHODS, BaselineConfig
from deltaw.errors import AdapterFileError, BaseMismatchError
from tests.baselines.conftest import OPTIONS

PAST = {"prefix_form": "past", "prefix_tokens": 3, "prefix_hidden": 5, "infix_tokens": 0}
CASES = [pytest.param(method, family, {}, marks=() if family == "bert" else pytest.mark.slow)
         for method in METHODS for family in ("qwen2", "bert")] + [("prelayer", "gpt2", PAST)]


def trained(method: str, model: Any, **options: Any) -> Any:
    tuned = METHODS[method](model, BaselineConfig(**{**OPTIONS.get(method, {}), **options}), 3)
    for parameter in tuned.parameters().values():
        torch.nn.init.normal_(parameter, std=0.2)
    return tuned


@pytest.mark.parametrize(("method", "family", "options"), CASES)
def test_what_was_saved_comes_back(method: str, family: str, options: dict[str, Any], tiny: Callable[..., Any],
                                   rows: dict[str, Any], tmp_path: Path) -> None:
    tuned = trained(method, tiny(family), **options)
    tuned.note(base_model="somewhere")
    expected = tuned.model(**rows).logits
    tuned.save(tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == set(tuned.file_names)
    assert baselines.is_baseline(tmp_path / "out") == (method != "lora")
    other = tiny(family)
    if family == "bert":  # a new head is drawn anew at each load
        torch.nn.init.normal_(other.classifier.weight)
    again = baselines.load(tmp_path / "out", other)
    torch.testing.assert_close(other(**rows).logits, expected, rtol=0, atol=1e-6 if options else 0)
    assert not any(p.requires_grad for p in other.parameters())
    assert again.facts.get("base_model", "somewhere") == "somewhere"
    again.remove()


@pytest.mark.parametrize("options", [{"prefix_tokens": 3, "infix_tokens": 0}, PAST], ids=["prompt", "prefix"])
@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_peft_loads_a_prompt_and_a_prefix(family: str, options: dict[str, Any], tiny: Callable[..., Any],
                                          rows: dict[str, Any], tmp_path: Path) -> None:
    import peft

    past = "prefix_form" in options
    tuned = trained("prelayer" if past else "preembed", tiny(family), **options)
    tuned.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny(family), tmp_path).eval()
    there = rows["attention_mask"].bool()
    with torch.no_grad():
        logits = theirs(**rows).logits
        expected = tuned.model(**rows).logits
    torch.testing.assert_close(logits[:, 0 if past else 3:][there], expected[there], rtol=1e-4, atol=1e-5)


def test_another_base_is_refused_and_left_as_it_was(tiny: Callable[..., Any], rows: dict[str, Any],
                                                    tmp_path: Path) -> None:
    trained("bitfit", tiny("qwen2")).save(tmp_path)
    other = tiny("qwen2", seed=1)
    before = other(**rows).logits
    with pytest.raises(BaseMismatchError, match="has other weights"):
        baselines.load(tmp_path, other)
    assert torch.equal(other(**rows).logits, before)
    baselines.load(tmp_path, other, any_base=True)
    with pytest.raises(BaseMismatchError, match="has other parameter names or shapes"):
        baselines.load(tmp_path, tiny("qwen2", hidden_size=64))


def test_a_folder_that_is_not_whole_is_refused(tiny: Callable[..., Any], tmp_path: Path) -> None:
    trained("adapter-h", tiny("llama")).save(tmp_path)
    record = tmp_path / "tuning.json"
    about = json.loads(record.read_text())
    for wrong, message in (({**about, "format": 2}, "is of format 2"), ({**about, "method": "bitfitt"}, "bitfit"),
                           ({**about, "options": {"botleneck": 3}}, "bottleneck"), ([], "is malformed")):
        record.write_text(json.dumps(wrong))
        with pytest.raises(AdapterFileError, match=message):
            baselines.read(tmp_path)
    record.write_text(json.dumps({**about, "options": {**about["options"], "bottleneck": 7}}))
    model = tiny("llama")
    with pytest.raises(AdapterFileError, match=r"has shape \(4, 32\); expected \(7, 32\)"):
        baselines.load(tmp_path, model)
    assert not any("deltaw" in name for name, _ in model.named_modules())
    record.write_text(json.dumps(about))
    (tmp_path / "tuning.safetensors").unlink()
    with pytest.raises(AdapterFileError, match=r"has no tuning.safetensors"):
        baselines.read(tmp_path)
