"""What the tests of the methods share: tiny models of each family, and how each method is set up on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                         "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
DECODERS = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2", "opt", "phi3")
ENCODERS = ("bert", "roberta", "deberta", "deberta-conv", "deberta-v1", "mpnet")
FAST = ("llama", "gpt2", "bert")
"""The families that every run of the tests looks at; the others are looked at with the slow tests."""


def families(*names: str) -> list[Any]:
    """Families as parameters of a test, all but a few of them marked slow."""
    return [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in names]


OPTIONS: dict[str, dict[str, Any]] = {
    "preembed": {"prefix_tokens": 3, "infix_tokens": 2}, "prelayer": {"prefix_tokens": 3, "infix_tokens": 2},
    "lora+pe": {"prefix_tokens": 3, "infix_tokens": 2}, "lora+pl": {"prefix_tokens": 3, "infix_tokens": 2},
    "ft-top-k": {"top_layers": 1}, "adapter-d": {"drop_layers": 1, "bottleneck": 4}, "adapter-h": {"bottleneck": 4},
    "adapter-l": {"bottleneck": 4}, "adapter-p": {"bottleneck": 4}, "subspace": {"dimension": 60},
}
"""Options that make a method small enough for these models."""


def build(family: str, seed: int = 0, **fields: Any) -> Any:
    """A model of a family: a language model of a decoder, a classifier with three labels of an encoder."""
    import transformers as t

    encoder = {**SMALL, "num_labels": 3}
    deberta = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16,
               "share_att_key": True, "position_biased_input": False,
               "norm_rel_ebd": "layer_norm", "pooler_hidden_size": 32}
    opt = {**{k: v for k, v in SMALL.items() if k != "intermediate_size"}, "ffn_dim": 48, "word_embed_proj_dim": 32}
    gemma = {**SMALL, **GROUPED, "sliding_window": 64}
    kinds: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "llama": (t.LlamaForCausalLM, t.LlamaConfig, {**SMALL, **GROUPED}),
        "qwen2": (t.Qwen2ForCausalLM, t.Qwen2Config, {**SMALL, "num_key_value_heads": 2}),
        "qwen3": (t.Qwen3ForCausalLM, t.Qwen3Config, {**SMALL, **GROUPED}),
        "gemma2": (t.Gemma2ForCausalLM, t.Gemma2Config, gemma),
        "gemma3": (t.Gemma3ForCausalLM, t.Gemma3TextConfig, gemma),
        "opt": (t.OPTForCausalLM, t.OPTConfig, {**opt, "init_std": 0.2}),
        "phi3": (t.Phi3ForCausalLM, t.Phi3Config, {**SMALL, "num_key_value_heads": 2, "bos_token_id": 1,
                                                   "eos_token_id": 2}),
        "gpt2": (t.GPT2LMHeadModel, t.GPT2Config, {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4,
                                                   "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2,
                                                   "pad_token_id": 0}),
        "bert": (t.BertForSequenceClassification, t.BertConfig, encoder),
        "roberta": (t.RobertaForSequenceClassification, t.RobertaConfig, encoder),
        "deberta": (t.DebertaV2ForSequenceClassification, t.DebertaV2Config, {**encoder, **deberta}),
        "deberta-conv": (t.DebertaV2ForSequenceClassification, t.DebertaV2Config,
                         {**encoder, **deberta, "type_vocab_size": 0, "conv_kernel_size": 3, "conv_act": "gelu"}),
        "deberta-v1": (t.DebertaForSequenceClassification, t.DebertaConfig,
                       {**encoder, "relative_attention": True, "pos_att_type": ["p2c", "c2p"],
                        "pooler_hidden_size": 32}),
        "mpnet": (t.MPNetForSequenceClassification, t.MPNetConfig, encoder),
    }
    model, config, small = kinds[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model(config(**{**small, "initializer_range": 0.2, **fields})).eval()


@pytest.fixture
def tiny() -> Callable[..., Any]:
    """`build`."""
    return build


@pytest.fixture
def rows() -> dict[str, torch.Tensor]:
    """Three rows of different lengths, padded on the right."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 64, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in ((1, 6), (2, 4)):
        ids[row, length:], mask[row, length:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


class Repeated:
    """The same micro-batches over and over."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.position = batches, 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self.position += 1
        return self.batches[(self.position - 1) % len(self.batches)]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: Any) -> None:
        self.position = state["position"]


@pytest.fixture
def batches() -> Callable[[str], Any]:
    """A function that makes two small batches for a family: rows with labels."""
    def make(family: str) -> Repeated:
        from deltaw.train.state import Batch

        generator = torch.Generator().manual_seed(1)
        made = []
        for number in range(2):
            ids = torch.randint(3, 64, (3, 9), generator=generator)
            mask = torch.ones_like(ids)
            ids[1, 6:], mask[1, 6:] = 0, 0
            if family in ENCODERS:
                labels = torch.tensor([0, 1, 2]).roll(number)
            else:
                labels = ids.masked_fill(mask == 0, -100)
                labels[:, :4 + number] = -100
            made.append(Batch({"input_ids": ids, "attention_mask": mask, "labels": labels}, ("a", "b", "c")))
        return Repeated(made)

    return make
