"""The architectures that are converted: llama.cpp's name of each, its metadata, and how it lays weights out.

Where Hugging Face's layout and llama.cpp's differ:

    llama, mistral   rows of q and k: a rotary pair is (i, i + d/2) here and (2i, 2i + 1) there, head by head
    gemma 1 to 3     RMSNorm multiplies by 1 + w here and by w there
    llama 3.1 on     the rotary frequencies' factors are computed from the config here and are a tensor there
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltaw.errors import BaseModelError, Fault, near

_ROTARY_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What a kind of model needs."""

    name: str
    """llama.cpp's name."""
    pairs_adjacent: bool = False
    """Rotary pairs lie side by side in llama.cpp, so that rows of q and k change places."""
    norm_plus_one: bool = False
    """Norm weights are stored without the 1 that they are added to."""


_FAMILIES: Mapping[str, Family] = {
    "llama": Family(name="llama", pairs_adjacent=True), "mistral": Family(name="llama", pairs_adjacent=True),
    "qwen2": Family(name="qwen2"), "qwen3": Family(name="qwen3"),
    "gemma": Family(name="gemma", norm_plus_one=True), "gemma2": Family(name="gemma2", norm_plus_one=True),
    "gemma3_text": Family(name="gemma3", norm_plus_one=True),
}


class Architecture:
    """One model's architecture: names and layout of its tensors in GGUF, and its metadata."""

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        import gguf

        kind = str(config.get("model_type"))
        if kind not in _FAMILIES:
            raise BaseModelError(Fault(f"base '{source}'", f"has the architecture '{kind}'", "one of "
                                       + ", ".join(_FAMILIES), near(kind, _FAMILIES)
                                       or "llama.cpp's own convert_hf_to_gguf.py knows more: deltaw merge, then that"))
        self.config, self.source, self.family = config, source, _FAMILIES[kind]
        self.heads = int(config["num_attention_heads"])
        self.kv_heads = int(config.get("num_key_value_heads") or self.heads)
        self.head_dim = int(config.get("head_dim") or config["hidden_size"] // self.heads)
        self.layers = int(config["num_hidden_layers"])
        number = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == self.family.name)
        self._names = gguf.get_tensor_name_map(number, self.layers)
        self._refuse_what_is_not_plain()

    def name_of(self, tensor: str) -> str | None:
        """GGUF's name of a tensor of the checkpoint; None where GGUF has none."""
        found = self._names.get_name(tensor, try_suffixes=(".weight", ".bias"))
        return None if found is None else str(found)

    def rows_of(self, tensor: str, weight: Tensor) -> Tensor:
        """A weight, its bias or a factor B (outputs first) with its rows in llama.cpp's order."""
        if not self.family.pairs_adjacent:
            return weight
        leaf = tensor.rpartition(".")[0].rpartition(".")[2]
        heads = {"q_proj": self.heads, "k_proj": self.kv_heads}.get(leaf)
        return weight if heads is None else adjacent_pairs(weight, heads)

    def value_of(self, tensor: str, weight: Tensor) -> Tensor:
        """A tensor of the checkpoint as GGUF holds it."""
        if self.family.norm_plus_one and weight.dim() == 1 and tensor.endswith("norm.weight"):
            return weight.float() + 1
        return self.rows_of(tensor, weight)

    def extra(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors that GGUF has and the checkpoint does not."""
        rope = self._rope()
        if rope.get("rope_type") == "llama3":
            yield _ROTARY_FACTORS, llama3_factors(rope, self.head_dim, self._theta())

    def describe(self, writer: Any) -> None:
        """Write the architecture's metadata."""
        config = self.config
        writer.add_block_count(self.layers)
        writer.add_context_length(int(config["max_position_embeddings"]))
        writer.add_embedding_length(int(config["hidden_size"]))
        writer.add_feed_forward_length(int(config["intermediate_size"]))
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv_heads)
        writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
        writer.add_rope_freq_base(self._theta())
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_rope_dimension_count(self.head_dim)
        writer.add_vocab_size(int(config["vocab_size"]))
        rope = self._rope()
        if rope.get("rope_type") == "linear":
            import gguf

            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(float(rope["factor"]))
        if self.family.name in ("gemma2", "gemma3"):
            writer.add_sliding_window(int(config["sliding_window"]))
        if self.family.name == "gemma2":
            writer.add_attn_logit_softcapping(float(config["attn_logit_softcapping"]))
            writer.add_final_logit_softcapping(float(config["final_logit_softcapping"]))

    def _rope(self) -> Mapping[str, Any]:
        """The rotary embedding's parameters; of several kinds of layers, those that see everything."""
        found = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        if "full_attention" in found:
            found = found["full_attention"]
        return {**found, "rope_type": found.get("rope_type", found.get("type", "default"))}

    def _theta(self) -> float:
        return float(self._rope().get("rope_theta") or self.config.get("rope_theta") or 10000.0)

    def _refuse_what_is_not_plain(self) -> None:
        """Refuse configs that llama.cpp would read as something else."""
        where, config, faults = f"base '{self.source}'", self.config, []
        rope = self._rope()["rope_type"]
        if rope not in ("default", "linear", "llama3"):
            faults.append(Fault(where, f"scales its rotary embedding by '{rope}'", "default, linear or llama3"))
        if self.family.name in ("llama", "qwen2", "qwen3") and config.get("sliding_window") and \
                config.get("use_sliding_window", True):
            faults.append(Fault(where, "has attention in a sliding window", "full attention"))
        if config.get("mlp_bias"):
            faults.append(Fault(where, "has biases in its MLP", "none"))
        if self.family.name == "gemma2" and self.head_dim != config.get("query_pre_attn_scalar", self.head_dim):
            faults.append(Fault(where, "scales its attention by another size than a head's", "the head's"))
        if faults:
            raise BaseModelError(*faults)


def adjacent_pairs(weight: Tensor, heads: int) -> Tensor:
    """Rows in which each head's rotary pairs (i, i + d/2) lie side by side."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).flatten(0, 2).contiguous()


def llama3_factors(rope: Mapping[str, Any], head_dim: int, theta: float) -> Tensor:
    """How much slower each rotary pair turns in a model made for long texts, (head_dim/2,) (Llama 3.1's rule).

    Wavelengths below the high bound stay, those above the low bound are stretched by `factor`, and in between the
    frequency is mixed.
    """
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    known = float(rope["original_max_position_embeddings"])
    wavelength = 2 * math.pi * theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    share = ((known / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - share) / factor + share)).float()
