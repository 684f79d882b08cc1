"""Weights that another library keeps as codes inside a tensor of its own, as torchao does: LoRA goes on top of them.

The stand-in has the dtype of its values, gives them when an operation asks, and cannot be read number by number.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import deltaw
from deltaw.bases.fingerprint import compare, fingerprint
from deltaw.errors import StateError


class Codes(Tensor):
    """Rows of int8 numbers, with a scale for each."""

    codes: Tensor
    scales: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scales: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scales.dtype)  # type: ignore[attr-defined]

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self.codes, self.scales = codes, scales

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scales"], None

    @classmethod
    def __tensor_unflatten__(cls, parts: dict[str, Tensor], *_: Any) -> Any:
        return cls(parts["codes"], parts["scales"])

    def values(self) -> Tensor:  # type: ignore[override]
        return self.codes * self.scales[:, None]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scales)
        if func is torch.ops.aten.select.int:
            raise IndexError("rows are not kept apart")
        return func(*tree_map(lambda t: t.values() if isinstance(t, Codes) else t, args), **(kwargs or {}))


@pytest.fixture
def model() -> nn.Sequential:
    made = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)).requires_grad_(False)
    for layer in (made[0], made[2]):
        scales = layer.weight.abs().amax(1) / 127
        codes = (layer.weight / scales[:, None]).round().to(torch.int8)
        layer.weight = nn.Parameter(Codes(codes, scales), requires_grad=False)
    return made


def test_an_adapter_trains_over_them_as_over_their_values(model: nn.Sequential) -> None:
    dense = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)).requires_grad_(False)
    for mine, theirs in ((dense[0], model[0]), (dense[2], model[2])):
        mine.weight.copy_(theirs.weight.values())
        mine.bias.copy_(theirs.bias)
    config, x = deltaw.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False), torch.randn(5, 12)
    boards = [deltaw.attach(each, config, seed=0) for each in (model, dense)]
    grads = []
    for each, board in zip((model, dense), boards, strict=True):
        each(x).square().sum().backward()
        grads.append([p.grad for p in board.parameters("default").values()])
    assert torch.allclose(model(x), dense(x), atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads, strict=True))
    assert boards[0].adapter("default").sites.keys() == boards[1].adapter("default").sites.keys()


def test_they_are_left_out_of_the_comparison_of_bases(model: nn.Sequential) -> None:
    found = fingerprint(model.named_parameters())
    plain = [(name, p.values() if isinstance(p, Codes) else p) for name, p in model.named_parameters()]
    assert compare(found, fingerprint(plain)) is None
    assert any(x == x for x in found.sample)  # biases are compared
    fault = compare(found, fingerprint([(name, p + 1 if name.endswith("bias") else p) for name, p in plain]))
    assert fault is not None


def test_a_merge_into_them_is_refused_by_name(model: nn.Sequential) -> None:
    board = deltaw.attach(model, deltaw.LoraConfig(r=2, target_modules="all-linear"), seed=0)
    for into in (None, "requantized"):
        with pytest.raises(StateError, match=r"quantized \(Codes\).*before quantization"):
            board.merge(into=into)
