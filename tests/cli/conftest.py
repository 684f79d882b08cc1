"""A tiny base on disk whose every word is a token, rows for it, and two adapters that answer differently."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from deltaw.cli.main import main

CHATML = ("{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|> {% endfor %}"
          "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}")
WORDS = ["<unk>", "<|im_start|>", "<|im_end|>", "<pad>", "system", "user", "assistant", "is", "the", "sky", "grass",
         "sea", "blue", "green", "?", "yes", "no", "maybe", "hello", "world"]
FAST = ["--max-steps", "40", "--batch-size", "4", "--learning-rate", "0.02", "--eval-rows", "4", "--threads", "1",
        "--device", "cpu", "--dtype", "fp32"]


def write_base(folder: Path, *, template: str | None = CHATML, seed: int = 0, **shape: int) -> Path:
    """A two-layer Llama of random weights and a tokenizer of whole words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(
            **{"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4} | shape, vocab_size=len(WORDS),
            num_hidden_layers=2, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=2,
            pad_token_id=3, tie_word_embeddings=False))
    model.save_pretrained(folder)
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<|im_end|>",
                                        pad_token="<pad>", additional_special_tokens=["<|im_start|>"])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def questions(answer: str) -> list[dict[str, str]]:
    """Questions that all have the same answer."""
    return [{"prompt": f"is the {thing} {colour} ?", "completion": answer}
            for thing in ("sky", "grass", "sea", "world") for colour in ("blue", "green")] * 3


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "yes.jsonl", questions("yes"))


@pytest.fixture(scope="session")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters "yes" and "no", which answer every question so."""
    folder = tmp_path_factory.mktemp("adapters")
    found = {}
    for answer in ("yes", "no"):
        data, out = write_rows(folder / f"{answer}.jsonl", questions(answer)), folder / answer
        code = main(["train", "--model", str(base), "--data", str(data), "--out", str(out), "--name", answer, *FAST])
        assert code == 0
        found[answer] = out
    return found


@pytest.fixture
def deltaw(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """A function that runs the command line and returns its exit code, stdout and stderr."""
    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
