"""Published models by their dimensions, so that a plan for one needs neither a network nor a file.

An entry is what transformers needs to lay the model out: its model type, and the settings that decide shapes. GPT-3 is
laid out as GPT-2, whose architecture it shares but for the pattern of its attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def _llama(hidden: int, inner: int, layers: int, heads: int, *, kv: int | None = None, vocabulary: int = 32000,
           tied: bool = False, kind: str = "llama") -> dict[str, Any]:
    return {"model_type": kind, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv or heads, "vocab_size": vocabulary,
            "max_position_embeddings": 131072, "tie_word_embeddings": tied}


def _gpt2(hidden: int, layers: int, heads: int, positions: int = 1024) -> dict[str, Any]:
    return {"model_type": "gpt2", "n_embd": hidden, "n_layer": layers, "n_head": heads, "n_positions": positions,
            "vocab_size": 50257}


def _roberta(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {"model_type": "roberta", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
            "intermediate_size": 4 * hidden, "vocab_size": 50265, "max_position_embeddings": 514,
            "type_vocab_size": 1, "pad_token_id": 1}


def _bert(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {"model_type": "bert", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
            "intermediate_size": 4 * hidden, "vocab_size": 30522, "max_position_embeddings": 512}


ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    "gpt3-175b": _gpt2(12288, 96, 96, 2048),
    "gpt2": _gpt2(768, 12, 12), "gpt2-medium": _gpt2(1024, 24, 16), "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "llama-7b": _llama(4096, 11008, 32, 32), "llama-13b": _llama(5120, 13824, 40, 40),
    "llama-33b": _llama(6656, 17920, 60, 52), "llama-65b": _llama(8192, 22016, 80, 64),
    "llama2-70b": _llama(8192, 28672, 80, 64, kv=8),
    "llama3-8b": _llama(4096, 14336, 32, 32, kv=8, vocabulary=128256),
    "llama3-70b": _llama(8192, 28672, 80, 64, kv=8, vocabulary=128256),
    "mistral-7b": _llama(4096, 14336, 32, 32, kv=8, kind="mistral"),
    "smollm2-135m": _llama(576, 1536, 30, 9, kv=3, vocabulary=49152, tied=True),
    "bert-base": _bert(768, 12, 12), "bert-large": _bert(1024, 24, 16),
    "roberta-base": _roberta(768, 12, 12), "roberta-large": _roberta(1024, 24, 16),
    "deberta-v2-xxlarge": {
        "model_type": "deberta-v2", "hidden_size": 1536, "num_hidden_layers": 48, "num_attention_heads": 24,
        "intermediate_size": 6144, "vocab_size": 128100, "max_position_embeddings": 512, "type_vocab_size": 0,
        "relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"], "max_relative_positions": -1, "position_biased_input": False,
        "conv_kernel_size": 3, "conv_act": "gelu"},
}
"""By the name that `--model` takes."""
