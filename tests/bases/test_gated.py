"""Gated feed-forwards are found by what they compute, keep two wide values less, and give the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltaw
from deltaw.bases.gated import gated_modules, product_made_again


class FeedForward(nn.Module):
    """down(act(gate(x))·up(x)) under names that say nothing, or something close to it."""

    def __init__(self, kind: str = "gated") -> None:
        super().__init__()
        self.kind = kind
        self.p, self.q, self.r = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)
        self.f = nn.GELU() if kind == "gelu" else nn.Dropout(0.1) if kind == "dropout" else nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "up first":
            u = self.q(x)
            y: Tensor = self.r(u * self.f(self.p(x)))
        elif self.kind == "scaled":
            y = self.r(self.f(self.p(x)) * self.q(x) * 1.001)
        elif self.kind == "residual":
            y = self.r(self.f(self.p(x)) * self.q(x)) + x
        elif self.kind == "other input":
            y = self.r(self.f(self.p(x)) * self.q(x + 1))
        else:
            y = self.r(self.f(self.p(x)) * self.q(x))
        return y


def attached(kind: str = "gated", dropout: float = 0.0) -> tuple[nn.Sequential, Any]:
    model = nn.Sequential(FeedForward(kind), FeedForward(kind))
    board = deltaw.attach(model, deltaw.LoraConfig(r=2, target_modules=["p", "q", "r"], init_lora_weights=False,
                                                   lora_dropout=dropout), "a", seed=0)
    return model, board


def gradients(board: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(1)
    y = board.model(x)
    y.tanh().square().sum().backward()
    found = {name: p.grad for name, p in board.parameters("a").items()} | {"x": x.grad}
    board.model.zero_grad()
    x.grad = None
    return y.detach(), found


@pytest.mark.parametrize("kind", ["gated", "gelu", "up first"])
@pytest.mark.parametrize("shared", [False, True])
def test_the_same_bits(kind: str, shared: bool) -> None:
    model, board = attached(kind)
    x = torch.randn(3, 5, 6, requires_grad=True)
    if shared:
        board.share_inputs(lambda: model(x))
    found = gated_modules(model, lambda: model(x))
    assert [one.module for one in found] == list(model)
    first: Any = model[0]
    assert found[0][1:] == (first.p, first.q, first.f, first.r, kind != "up first")
    y, expected = gradients(board, x)
    with product_made_again(found):
        y_again, again = gradients(board, x)
        assert torch.equal(y, y_again)
        assert all(torch.equal(expected[name], again[name]) for name in expected)
        with torch.no_grad():
            assert torch.allclose(model(x), y, atol=1e-6)
    assert "forward" not in first.__dict__


@pytest.mark.parametrize("trains", [False, True])
def test_with_dropout_and_a_second_backward(trains: bool) -> None:
    model, board = attached(dropout=0.4)
    model.train(trains)
    x = torch.randn(3, 6, requires_grad=True)
    found = gated_modules(model.eval(), lambda: model(x))
    model.train(trains)
    _, expected = gradients(board, x)
    with product_made_again(found):
        torch.manual_seed(1)
        loss = model(x).tanh().square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    for name, p in board.parameters("a").items():
        assert torch.allclose(p.grad, 2 * expected[name])


@pytest.mark.parametrize("kind", ["scaled", "residual", "other input"])
def test_what_only_looks_like_it_is_left_alone(kind: str) -> None:
    model, _ = attached(kind)
    assert gated_modules(model, lambda: model(torch.randn(2, 6))) == []


@pytest.mark.parametrize("training", [False, True])
def test_an_activation_that_draws_is_left_alone(training: bool) -> None:
    model, _ = attached("dropout")
    model.train(training)
    assert gated_modules(model, lambda: model(torch.randn(2, 6))) == []


def kept(model: nn.Module, x: Tensor) -> int:
    """Bytes of different storages that the graph keeps, parameters apart."""
    found = {}

    def pack(tensor: Any) -> Any:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert y.requires_grad
    return sum(t.numel() * t.element_size() for place, t in found.items() if place not in own)


def test_two_wide_values_of_each_token_are_not_kept() -> None:
    model, board = attached()
    x = torch.randn(50, 6, requires_grad=True)
    board.share_inputs(lambda: model(x))
    before = kept(model, x)
    with product_made_again(gated_modules(model, lambda: model(x))):
        # What the inner hooks take does not come to the outer ones: neither the product nor act(g).
        assert before - kept(model, x) >= 2 * 2 * 50 * 8 * 4


def test_models_of_transformers(tiny_llama: Callable[..., Any], tiny_gpt2: Callable[..., Any]) -> None:
    ids = torch.randint(3, 60, (2, 9))
    llama, gpt2 = tiny_llama(), tiny_gpt2()
    assert [one.module for one in gated_modules(llama, lambda: llama(input_ids=ids))] == \
        [layer.mlp for layer in llama.model.layers]
    assert gated_modules(gpt2, lambda: gpt2(input_ids=ids)) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiler_sees_the_plain_formula() -> None:
    model, board = attached()
    x = torch.randn(3, 6, requires_grad=True)
    found = gated_modules(model, lambda: model(x))
    y, expected = gradients(board, x)
    with product_made_again(found):
        torch.compiler.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        again = compiled(x)
        again.tanh().square().sum().backward()
    assert torch.allclose(again, y, atol=1e-6)
    assert all(torch.allclose(p.grad, expected[name], atol=1e-5) for name, p in board.parameters("a").items())
