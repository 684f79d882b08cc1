"""The laws over a base quantized by bitsandbytes: frozen 4-bit and 8-bit linear layers, on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltaw
from deltaw import LoraConfig
from deltaw.core.layers import plain_layers
from deltaw.errors import StateError
from tests.laws.dense import error, fill
from tests.laws.test_undo import snapshot

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
# What bitsandbytes and the parts of torch that it loads say of themselves is not what is tested.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:MatMul8bitLt:UserWarning")

KINDS = ("nf4", "fp4", "int8")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}


def quantized(kind: str, dtype: torch.dtype) -> nn.Sequential:
    """Two linear layers, the first quantized."""
    torch.manual_seed(0)
    plain, head = nn.Linear(64, 32), nn.Linear(32, 8)
    layer: Any
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(plain.weight.data, requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(64, 32, compute_dtype=dtype, quant_type=kind)
        layer.weight = bnb.nn.Params4bit(plain.weight.data, requires_grad=False, quant_type=kind, module=layer)
    layer.bias = nn.Parameter(plain.bias.data)
    try:
        model = nn.Sequential(layer.to("cpu"), head.to(dtype))  # moving is what quantizes
        model(torch.zeros(1, 64, dtype=dtype))
    except (NotImplementedError, RuntimeError) as reason:
        pytest.skip(f"bitsandbytes cannot run {kind} here: {reason}")
    assert not model[0].weight.is_floating_point()
    return model.eval()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_output_routing_and_undo(kind: str, dtype: torch.dtype) -> None:
    model = quantized(kind, dtype)
    x = torch.randn(4, 64).to(dtype)
    before, plain = snapshot(model), model(x)
    hidden = model[0](x)
    board = deltaw.attach(model, LoraConfig(r=4, target_modules=["0"]), "a", seed=0)
    assert torch.equal(model(x), plain)
    fill(board, "a", seed=3)
    expected = hidden.detach().double() + x.double() @ board.adapter("a").delta("0").double().t()
    assert error(model[0](x), expected) < TOLERANCE[dtype]
    assert error(hidden, expected) > 0.1
    with board.route(["a", None, "a", None]):
        routed = model[0](x)
    assert error(routed[::2], expected[::2]) < TOLERANCE[dtype]
    assert torch.equal(routed[1::2], hidden[1::2])
    state = snapshot(model)
    with pytest.raises(StateError, match="quantized"):
        board.merge()
    assert snapshot(model) == state
    deltaw.detach(model)
    assert snapshot(model) == before
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_values(kind: str) -> None:
    model = quantized(kind, torch.float32)
    x, target = torch.randn(8, 64), torch.randn(8, 8)
    frozen = model[0].weight.clone()
    board = deltaw.attach(model, LoraConfig(r=4, bias="lora_only"), "a", seed=0)
    assert {t.site.geometry.shape for t in board.table("a") if t.rank} == {(32, 64), (8, 32)}
    reason = f"{type(model[0]).__name__} multiplies in a way of its own"
    assert plain_layers(lambda: model(x)) == {reason: ("0",), "a trained bias": ("1",)}
    optimizer = torch.optim.AdamW(board.parameters("a").values(), lr=0.01)
    losses: list[Tensor] = []
    for _ in range(5):
        loss = (model(x) - target).square().mean()
        loss.backward()
        assert all(p.grad is not None for p in board.parameters("a").values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    assert losses[-1] < losses[0]
    assert torch.equal(model[0].weight, frozen)
    other = quantized(kind, torch.float32)
    deltaw.attach(other, board.adapter("a"))
    assert torch.equal(other(x), model(x))
    twin = copy.deepcopy(model)
    deltaw.board(twin).use(None)
    assert torch.equal(model(x), other(x))
