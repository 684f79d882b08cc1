"""How many values each way of tuning trains.

Low-rank changes are counted at the very sites where `attach` would put them, on a network without values. The other
ways are counted by the closed forms of their papers, with d the width, L the layers, n trained positions, m the
bottleneck and k the width of all keys of a layer:

    preembed   d·n                      PreEmbed of the LoRA paper, Lester et al. 2021; n = l_p + l_i
    prelayer   L·d·n                    PreLayer of the LoRA paper (section 5.1)
    (prefix)   2·L·k·n                  the same by keys and values of the past, Li & Liang 2021
    adapter-h  2·L·(2·d·m + m + d)      Houlsby et al. 2019: after attention and after the MLP, with biases
    adapter-l  L·(2·d·m + m + d + 2·d)  Lin et al. 2020: after the MLP and a LayerNorm of its own
    adapter-p  L·(2·d·m + m + d)        Pfeiffer et al. 2021: after the MLP
    bitfit     every bias               Ben Zaken et al. 2022
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from deltaw.core.config import LoraConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deltaw.inject import Target

TASK_TYPES = {"causal-lm": "CAUSAL_LM", "seq-cls": "SEQ_CLS"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimensions:
    """The sizes that the closed forms take."""

    width: int
    layers: int
    keys: int
    """Width of all keys of a layer: smaller than `width` where heads share them."""

    @classmethod
    def of(cls, config: Any) -> Dimensions:
        """Those of a config of transformers."""
        text = config.get_text_config()
        width, heads = int(text.hidden_size), int(getattr(text, "num_attention_heads", 1) or 1)
        head = getattr(text, "head_dim", None) or width // heads
        shared = getattr(text, "num_key_value_heads", None) or heads
        return cls(width=width, layers=int(text.num_hidden_layers), keys=int(shared * head))


def prompt(dims: Dimensions, positions: int) -> int:
    """Trained embeddings at the input."""
    return dims.width * positions


def prelayer(dims: Dimensions, positions: int) -> int:
    """Trained activations after every layer."""
    return dims.layers * dims.width * positions


def prefix(dims: Dimensions, positions: int) -> int:
    """Trained keys and values in every layer."""
    return 2 * dims.layers * dims.keys * positions


def bottleneck(dims: Dimensions, width: int) -> int:
    """One adapter layer: down, its bias, up, its bias."""
    return 2 * dims.width * width + width + dims.width


def houlsby(dims: Dimensions, width: int) -> int:
    """Two adapter layers in each layer."""
    return 2 * dims.layers * bottleneck(dims, width)


def pfeiffer(dims: Dimensions, width: int) -> int:
    """One adapter layer in each layer."""
    return dims.layers * bottleneck(dims, width)


def lin(dims: Dimensions, width: int) -> int:
    """One adapter layer and one LayerNorm in each layer."""
    return dims.layers * (bottleneck(dims, width) + 2 * dims.width)


def full(model: nn.Module) -> int:
    """Every parameter, a tied one once."""
    return sum(p.numel() for p in model.parameters())


def biases(model: nn.Module) -> list[Tensor]:
    """Every bias, by its place in its module."""
    return [p for module in model.modules() for leaf, p in module._parameters.items()
            if p is not None and p.dim() == 1 and (leaf == "bias" or leaf.endswith("_bias"))]


def bitfit(model: nn.Module, task: str = "causal-lm") -> int:
    """Every bias, and a classifier's head whole."""
    body: Any = getattr(model, "base_model", model) if task == "seq-cls" else model
    return sum(p.numel() for p in biases(body)) + heads(model, task)


def low_rank(model: nn.Module, lora: LoraConfig, task: str) -> list[Target]:
    """The sites of a low-rank change on this network, each with its count."""
    from deltaw.inject import find_sites, resolve

    return resolve(with_task(lora, task), model, find_sites(model))


def with_task(lora: LoraConfig, task: str) -> LoraConfig:
    """The config as training uses it: a classifier's head is trained with the change."""
    return replace(lora, task_type=lora.task_type or TASK_TYPES[task])


def heads(model: nn.Module, task: str) -> int:
    """Values of a classifier's head, which every way of tuning trains."""
    body: Any = getattr(model, "base_model", model)
    if task != "seq-cls" or body is model:
        return 0
    return full(model) - full(body)
