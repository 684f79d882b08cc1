"""Networks of published shapes with random weights, made on the device and in the number format they are used in."""

from __future__ import annotations

from typing import Any

import torch

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2": {"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
                "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
                "tie_word_embeddings": True, "max_position_embeddings": 8192},
    "qwen": {"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
             "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
             "tie_word_embeddings": True},
    "llama1b": {"model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
                "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
                "tie_word_embeddings": False, "max_position_embeddings": 8192},
    "llama7b": {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
                "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
                "tie_word_embeddings": False, "max_position_embeddings": 8192},
    "bert": {"model_type": "bert", "num_labels": 3, "num_hidden_layers": 12, "hidden_dropout_prob": 0.0,
             "attention_probs_dropout_prob": 0.0},
}
"""SmolLM2-135M, Qwen2.5-0.5B, TinyLlama-1.1B, Llama-2-7B (both with room for 8,192 positions) and BERT-base."""


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""Names of every linear layer in a layer of the decoders."""


def model_of(shape: str, dtype: torch.dtype, layers: int | None = None, device: str = "cpu") -> torch.nn.Module:
    """A network of this shape in training mode: a classifier for "bert", else a language model."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    config = AutoConfig.for_model(**SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {}))
    auto = AutoModelForSequenceClassification if shape == "bert" else AutoModelForCausalLM
    torch.manual_seed(0)
    with torch.device(device):
        return auto.from_config(config, dtype=dtype).train()


def batch_of(rows: int, tokens: int, device: str = "cpu", classes: int = 0) -> dict[str, torch.Tensor]:
    """Random tokens, all of them learned from; with `classes` a label for each row instead."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 30000, (rows, tokens), generator=generator)
    labels = torch.randint(0, classes, (rows,), generator=generator) if classes else ids
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}
