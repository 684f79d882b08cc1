"""What the training tests share: fixed micro-batches on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from deltaw.train.state import Batch
from tests.device import DEVICE


class FixedBatches:
    """The same micro-batches over and over; the position is their count."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches, self.position = list(batches), 0

    def __next__(self) -> Batch:
        self.position += 1
        return self.batches[(self.position - 1) % len(self.batches)]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.position = state["position"]


@pytest.fixture
def text_batches() -> Callable[..., FixedBatches]:
    """A function that makes random right-padded batches whose last tokens are supervised."""
    def make(count: int = 3, rows: int = 4, length: int = 12, seed: int = 0, vocab: int = 64) -> FixedBatches:
        generator = torch.Generator().manual_seed(seed)
        batches = []
        for number in range(count):
            ids = torch.randint(3, vocab, (rows, length), generator=generator)
            mask, labels = torch.ones_like(ids), ids.clone()
            for row in range(rows):
                end = length - row % 4
                answer = 1 + (row + number) % 3
                ids[row, end:], mask[row, end:], labels[row, end:] = 0, 0, -100
                labels[row, :end - answer] = -100
            where = tuple(f"rows.jsonl:{number * rows + row + 1}" for row in range(rows))
            inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
            batches.append(Batch({name: tensor.to(DEVICE) for name, tensor in inputs.items()}, where))
        return FixedBatches(batches)

    return make


ANSWERS = {"red": "R", "blue": "B", "green": "G"}


def character_tokenizer() -> Any:
    """A tokenizer with one token for each printable character; it adds nothing to a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *map(chr, range(32, 127))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                   unk_token="<unk>")


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A tokenizer of single characters."""
    return character_tokenizer()


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny language model and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    folder = tmp_path_factory.mktemp("base")
    tokenizer = character_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
            initializer_range=0.2))
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def color_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 48 prompts with one of three answers each."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    colors = list(ANSWERS)
    rows = [{"prompt": f"{colors[i % 3]}{i % 7}:", "completion": ANSWERS[colors[i % 3]]} for i in range(48)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
