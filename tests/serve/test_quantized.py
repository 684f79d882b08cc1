"""Quantized bases: answers of a mixed batch against PEFT's on bitsandbytes' own model, one prompt at a time."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from deltaw.serve.request import SamplingParams
from deltaw.serve.service import open_service
from tests.cli.conftest import write_base
from tests.serve.conftest import config, tokens_of, write_adapter
from tests.serve.test_engine import PROMPTS as ALL
from tests.serve.test_engine import ask

pytest.importorskip("bitsandbytes")
PROMPTS = ALL[1:4]
PARAMS = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks of 64 numbers, as nf4 has them."""
    return write_base(tmp_path_factory.mktemp("wide") / "base", hidden_size=64, intermediate_size=128)


@pytest.fixture(scope="module")
def folders(wide_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: write_adapter(wide_base, root / name, seed, r=rank, lora_alpha=40, target_modules="all-linear")
            for seed, (name, rank) in enumerate({"a": 4, "b": 9}.items())}


def answers(base: Path, adapter: Path | None, stored: str) -> list[list[int]]:
    """The greedy answers of transformers and PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = BitsAndBytesConfig(load_in_8bit=True) if stored == "int8" else BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=stored, bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the two warn of while loading is not what a test is about
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=how)
        model = (model if adapter is None else PeftModel.from_pretrained(model, adapter)).eval()
        found = []
        for prompt in PROMPTS:
            ids = tokens_of(prompt)
            with torch.no_grad():
                for _ in range(10):
                    ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            found.append(ids[-10:])
    return found


@pytest.mark.parametrize("stored", ["nf4", "int8"])
def test_adapters_beside_each_other_on_a_quantized_base(stored: Any, wide_base: Path,
                                                        folders: dict[str, Path]) -> None:
    """With --auto-merge, which leaves packed weights alone."""
    told: list[str] = []
    expected = {name: answers(wide_base, folder, stored) for name, folder in ({"": None} | folders).items()}
    served = config(wide_base, quantize=stored, auto_merge=1e-9, places=12)
    with open_service(served, folders, warn=told.append) as service:
        assert str(service.base.quantized).startswith(stored)
        assert [ask(service, PROMPTS[0], {"a": 1.0}, PARAMS).tokens for _ in range(2)] == [expected["a"][0]] * 2
        asked = {(name, i): ask(service, prompt, {name: 1.0} if name else {}, PARAMS)
                 for name in expected for i, prompt in enumerate(PROMPTS)}
        assert {key: one.tokens for key, one in asked.items()} == {(name, i): expected[name][i] for name, i in asked}
    assert expected["a"] != expected["b"] != expected[""]
    assert [text for text in told if f"it is loaded in {stored}" in text] == told
    assert [str(folders[name]) in text for name, text in zip("ab", told, strict=True)] == [True, True]
