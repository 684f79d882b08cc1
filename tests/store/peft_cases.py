"""Small models and PEFT configs, one for each kind of weight and each option that shows in PEFT's files."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 12), nn.Linear(12, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Layers(nn.Module):
    """An embedding, three blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Fused(nn.Module):
    """transformers' Conv1D, whose weight has its inputs first."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.c_attn, self.out = Conv1D(24, 8), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.c_attn(x)))


class Convs(nn.Module):
    """A convolution of `n` dimensions, and one over groups."""

    def __init__(self, n: int, groups: int) -> None:
        super().__init__()
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1]
        # PEFT computes ΔW of a 1x1x1 convolution wrongly, so three dimensions get a wider one.
        self.first, self.second = kind(4, 6, 3, padding=1), kind(6, 8, 1 if n < 3 else 2)
        self.third = kind(8, 12, 3, padding=1, stride=2, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(self.first(x))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attn(x, x, x)[0])


class Experts(nn.Module):
    """Two stacks of experts, whose order in the module is not that of their names, and a router of two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 10, 8) * 0.3)
        self.down = nn.Parameter(torch.randn(3, 8, 10) * 0.3)
        self.router = nn.Parameter(torch.randn(3, 8) * 0.3)
        self.mix = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        gates = torch.softmax(x @ self.router.t(), -1)
        hidden = torch.tanh(torch.einsum("eoi,...i->...eo", self.up, x))
        return self.mix(torch.einsum("...e,eio,...eo->...i", gates, self.down, hidden))


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"mlp": Experts()}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["mlp"](x)
        return x


@dataclass(frozen=True)
class Case:
    """A model, a PEFT config for it, and an input."""

    name: str
    build: Callable[[], nn.Module]
    options: dict[str, Any] = field(default_factory=dict)
    inputs: tuple[int, ...] = (2, 5, 8)
    ids: bool = False

    def model(self) -> nn.Module:
        """The model, always with the same weights."""
        torch.manual_seed(3)
        return self.build().eval()

    def x(self) -> Tensor:
        torch.manual_seed(4)
        return torch.randint(0, 11, self.inputs) if self.ids else torch.randn(self.inputs)

    def peft_model(self) -> Any:
        """PEFT's model with nothing left at its initial value that training could change."""
        from peft import LoraConfig, get_peft_model

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(self.model(), LoraConfig(**{"r": 2, "lora_alpha": 5} | self.options))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        return model.eval()


WORDS = {"build": Layers, "inputs": (2, 5), "ids": True}
CASES = [
    Case("linear", **WORDS, options={"target_modules": ["up", "down"]}),
    Case("regex", **WORDS, options={"target_modules": r"layers\.[02]\.up"}),
    Case("some_layers", **WORDS, options={"target_modules": ["up"], "layers_to_transform": [0, 2],
                                          "layers_pattern": ["layers"]}),
    Case("excluded", **WORDS, options={"target_modules": ["up", "down"], "exclude_modules": ["layers.1.up"]}),
    Case("all_linear", **WORDS, options={"target_modules": "all-linear"}),
    Case("embedding", **WORDS, options={"target_modules": ["embed", "up"]}),
    Case("rslora", **WORDS, options={"target_modules": ["up"], "use_rslora": True, "r": 3}),
    Case("patterns", **WORDS, options={"target_modules": ["up", "down", "embed"],
                                       "rank_pattern": {"layers.1.up": 4, "down": 1},
                                       "alpha_pattern": {r"layers\.\d\.up": 9, "embed": 3}}),
    Case("patterns_rslora", **WORDS, options={"target_modules": ["up", "down"], "use_rslora": True,
                                              "rank_pattern": {"^layers.1.up": 3}, "alpha_pattern": {"down": 7}}),
    Case("bias_lora_only", **WORDS, options={"target_modules": ["up"], "bias": "lora_only"}),
    Case("bias_all", **WORDS, options={"target_modules": ["up"], "bias": "all"}),
    Case("saved", **WORDS, options={"target_modules": ["up"], "modules_to_save": ["head"]}),
    Case("saved_bias_all", **WORDS, options={"target_modules": ["up"], "modules_to_save": ["head"], "bias": "all"}),
    Case("conv1d_of_transformers", Fused, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    Case("conv1", lambda: Convs(1, 1), {"target_modules": ["first", "second", "third"]}, (2, 4, 7)),
    Case("conv2", lambda: Convs(2, 1), {"target_modules": ["first", "second", "third"]}, (2, 4, 7, 7)),
    Case("conv3", lambda: Convs(3, 1), {"target_modules": ["first", "second", "third"]}, (2, 4, 5, 5, 5)),
    Case("grouped_conv1", lambda: Convs(1, 2), {"target_modules": ["third"], "r": 4}, (2, 4, 7)),
    Case("grouped_conv2", lambda: Convs(2, 4), {"target_modules": ["third", "first"], "r": 8}, (2, 4, 7, 7)),
    Case("attention", Attention, {"target_modules": ["attn"]}),
    Case("attention_and_linear", Attention, {"target_modules": ["attn", "out"], "rank_pattern": {"attn": 3},
                                             "alpha_pattern": {"out": 2, "attn": 4}, "bias": "lora_only"}),
    Case("parameters", Mixture, {"target_modules": [], "target_parameters": ["mlp.up"]}),
    Case("two_parameters", Mixture, {"target_modules": [], "target_parameters": ["mlp.up", "mlp.down"], "r": 3}),
    Case("three_parameters", Mixture, {"target_modules": ["mix"],
                                       "target_parameters": ["mlp.up", "mlp.down", "mlp.router"],
                                       "rank_pattern": {"router": 1}, "alpha_pattern": {"up": 7}}),
    Case("weight_parameter", **WORDS, options={"target_modules": [], "target_parameters": ["up.weight"]}),
]
