"""Models of other structures: two adapters and the base in one batch, against PEFT alone, token for token in fp32.

A model that cannot run in one row is found out by the trial at the start and runs sequence by sequence.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import deltaw
from deltaw import bases
from deltaw.serve import runner as runners
from deltaw.serve.request import SamplingParams
from deltaw.serve.service import Service, build
from tests.serve.conftest import config
from tests.serve.test_engine import Listener

COUNT = 8
GREEDY = SamplingParams(max_tokens=COUNT, temperature=0, ignore_eos=True)
SHAPE = {"vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 64, "intermediate_size": 48}
GROUPED = SHAPE | {"num_key_value_heads": 2, "head_dim": 16}
WINDOW = 8
"""Shorter than the longest prompts, so that it is felt."""
FELT = {"tie_word_embeddings": False, "initializer_range": 0.3}
"""Tied, and with small weights, these only say again what they read last, whatever an adapter adds."""
LINEAR, ROW, APART = "all-linear", "RowRunner", "ApartRunner"
MODELS: dict[str, tuple[str, dict[str, Any], str | list[str], str]] = {
    "gpt2": ("GPT2", {"vocab_size": 20, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, LINEAR, ROW),
    "neox": ("GPTNeoX", SHAPE, LINEAR, ROW),
    "opt": ("OPT", {"vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 48,
                    "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 32}, LINEAR, ROW),
    "gemma3": ("Gemma3", GROUPED | {"sliding_window": WINDOW,
                                    "layer_types": ["sliding_attention", "full_attention"]}, LINEAR, ROW),
    "mistral": ("Mistral", GROUPED | {"sliding_window": WINDOW}, LINEAR, ROW),
    "gemma2": ("Gemma2", GROUPED | {"sliding_window": WINDOW}, LINEAR, APART),
    "mamba": ("Mamba", {"vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 2} | FELT, ["in_proj"], APART),
    "mixtral": ("Mixtral", GROUPED | {"num_local_experts": 4}, LINEAR, ROW),
    "qwen3moe": ("Qwen3Moe", GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
                 LINEAR, ROW),
    "bloom": ("Bloom", {"vocab_size": 20, "hidden_size": 32, "n_layer": 2, "n_head": 4} | FELT, LINEAR, APART),
    "falcon": ("Falcon", {"vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
               LINEAR, APART),
}
FAST = (("gpt2", None), ("gemma3", None), ("gemma2", "parts"), ("mamba", "whole"))


def made(name: str) -> Any:
    import transformers as hf

    kind, fields, _, _ = MODELS[name]
    settings = getattr(hf, f"{kind}Config" if kind != "Gemma3" else "Gemma3TextConfig")(**fields)
    torch.manual_seed(3)
    return getattr(hf, f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(settings).eval()


def adapter(model: Any, folder: Path, targets: str | list[str], rank: int) -> Path:
    torch.manual_seed(10 + rank)
    board = deltaw.attach(copy.deepcopy(model), deltaw.LoraConfig(
        r=rank, lora_alpha=30, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM"), name="a")
    board.adapter("a").save(folder)
    return folder


def greedy(model: Any, prompt: list[int]) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(COUNT):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt):]


def with_peft(model: Any, folder: Path) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT warns of while loading is not what a test is about
        return PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()


@contextmanager
def running(model: Any, tokenizer: Any, adapters: dict[str, Path]) -> Iterator[Service]:
    base = bases.Base(model=model, tokenizer=tokenizer, source="x", kind="folder", folder=None, dtype=torch.float32,
                      dtype_reason="")
    service = build(config(Path("x"), any_base=True, prefill_tokens=20), base)
    for name, folder in adapters.items():
        service.engine.pool.register(name, folder)
    service.engine.start()
    try:
        yield service
    finally:
        service.close()


CASES = [(name, None if MODELS[name][3] == ROW else "whole" if name == "mamba" else "parts") for name in MODELS]


@pytest.mark.parametrize(("name", "keeps"), [
    pytest.param(name, keeps, marks=() if (name, keeps) in FAST else pytest.mark.slow)
    for name, keeps in [*CASES, ("mamba", "nothing")]])
def test_a_mixed_batch_is_pefts_answers(name: str, keeps: str | None, base_folder: Path, tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """`keeps` is what a model's own cache is good for, which is tried out where it runs sequence by sequence."""
    from transformers import AutoTokenizer

    _, _, targets, runner = MODELS[name]
    model = made(name)
    adapters = {f"a{rank}": adapter(model, tmp_path / str(rank), targets, rank) for rank in (2, 5)}
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, 20, (length,), generator=generator).tolist() for length in (3, 14, 31)]
    models = {"": model} | {key: with_peft(model, folder) for key, folder in adapters.items()}
    expected = {(key, i): greedy(one, prompt) for key, one in models.items() for i, prompt in enumerate(prompts)}
    answers = {tuple(tuple(expected[key, i]) for i in range(len(prompts))) for key in models}
    assert len(answers) == len(models), "adapters that change nothing test nothing"
    if name == "mamba" and keeps == "nothing":
        monkeypatch.setattr(runners, "CACHES", ())
    with running(model, AutoTokenizer.from_pretrained(base_folder), adapters) as service:
        assert type(service.engine._runner).__name__ == runner
        assert getattr(service.engine._runner, "keeps", None) == keeps
        asked = {(key, i): Listener() for key, i in expected}
        for (key, i), listener in asked.items():
            service.submit(prompts[i], {key: 1.0} if key else {}, GREEDY, [listener])
        assert {which: listener.tokens for which, listener in asked.items()} == expected
