"""The laws over a base quantized by bitsandbytes: frozen 4-bit and 8-bit linear layers."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import deltaw
from deltaw import LoraConfig
from deltaw.core.layers import plain_layers
from deltaw.core.packed import Packed, packed_weight
from deltaw.errors import DoctorError, StateError
from tests.device import DEVICE, ON_CPU, randn
from tests.laws.dense import error, fill, same
from tests.laws.test_undo import snapshot

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
# What bitsandbytes and the parts of torch that it loads say of themselves is not what is tested.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:MatMul8bitLt:UserWarning")

KINDS = ("nf4", "fp4", "int8")
UNPACKED = KINDS if ON_CPU else ("nf4", "fp4")
"""What training unpacks. On a GPU int8 is left to bitsandbytes, which rounds x to 8 bits and gradients to 16."""
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
    layer.support_avx512bf16_for_cpu = False  # what a first evaluation makes of the codes is tested by itself
    try:
        model = nn.Sequential(layer.to(DEVICE), head.to(DEVICE, dtype))  # moving is what quantizes
        model(torch.zeros(2, 64, dtype=dtype, device=DEVICE))
    except (NotImplementedError, RuntimeError) as reason:
        pytest.skip(f"bitsandbytes cannot run {kind} here: {reason}")
    assert not model[0].weight.is_floating_point()
    return model.eval()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_output_routing_and_undo(kind: str, dtype: torch.dtype) -> None:
    model = quantized(kind, dtype)
    x = randn(4, 64).to(dtype)
    before, plain = snapshot(model), model(x)
    hidden = model[0](x)
    board = deltaw.attach(model, LoraConfig(r=4, target_modules=["0"]), "a", seed=0)
    assert same(model(x), plain, TOLERANCE[dtype])
    fill(board, "a", seed=3)
    expected = hidden.detach().double() + x.double() @ board.adapter("a").delta("0").double().t()
    assert error(model[0](x), expected) < TOLERANCE[dtype]
    assert error(hidden, expected) > 0.1
    with board.route(["a", None, "a", None]):
        routed = model[0](x)
    assert error(routed[::2], expected[::2]) < TOLERANCE[dtype]
    assert same(routed[1::2], hidden[1::2], TOLERANCE[dtype])
    state = snapshot(model)
    with pytest.raises(StateError, match="quantized"):
        board.merge()
    assert snapshot(model) == state
    deltaw.detach(model)
    assert snapshot(model) == before
    assert torch.equal(model(x), plain)


@pytest.mark.skipif(not ON_CPU, reason="bitsandbytes reorders codes on a CPU")
def test_codes_are_not_reordered_while_attached(monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized("nf4", torch.float32)
    moved = []

    def reorder(codes: Tensor, state: Any) -> tuple[Tensor, Any]:
        moved.append(codes)
        return codes, state

    monkeypatch.setattr(bnb.nn.modules, "_convert_weight_packed_for_cpu", reorder)
    model[0].support_avx512bf16_for_cpu = True  # as on a processor with AVX512-BF16
    x = randn(4, 64)
    model(x)
    assert len(moved) == 1  # bitsandbytes by itself
    board = deltaw.attach(model, LoraConfig(r=4, target_modules=["1"]), "a", seed=0)
    model(x)
    board.use(None)
    model(x)
    assert len(moved) == 1
    deltaw.detach(model)
    assert model[0].support_avx512bf16_for_cpu is True


def test_no_run_starts_over_codes_that_were_reordered() -> None:
    from deltaw.train.doctor import Doctor
    from deltaw.train.tuning import LoraTuning

    model = quantized("nf4", torch.float32)
    board = deltaw.attach(model, LoraConfig(r=4), "a", seed=0)
    Doctor(LoraTuning(board, "a")).start()
    model[0].weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(DoctorError, match="no gradient through 0, which bitsandbytes has reordered"):
        Doctor(LoraTuning(board, "a")).start()
    deltaw.detach(model)
    with pytest.raises(StateError, match=r"reordered the codes of 1 layers .* '0' first"):
        deltaw.attach(model, LoraConfig(r=4), "a", seed=0)


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_values(kind: str) -> None:
    model = quantized(kind, torch.float32)
    x, target = randn(8, 64), randn(8, 8)
    frozen = model[0].weight.clone()
    board = deltaw.attach(model, LoraConfig(r=4, bias="lora_only"), "a", seed=0)
    assert {t.site.geometry.shape for t in board.table("a") if t.rank} == {(32, 64), (8, 32)}
    if kind in UNPACKED:  # a quantized layer is fused as well
        assert plain_layers(lambda: model(x)) == {"a trained bias": ("0", "1")}
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


def dense_twin(model: nn.Sequential, board: Any) -> nn.Sequential:
    """The same network in float64 with W + BA in the place of the quantized layer."""
    W = packed_weight(model[0])
    assert W is not None
    twin = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8)).to(DEVICE).double()
    with torch.no_grad():
        twin[0].weight.copy_(W.dense(torch.float32).double() + board.adapter("a").delta("0").double())
        twin[0].bias.copy_(model[0].bias)
        twin[1].load_state_dict({"weight": model[1].weight.double(), "bias": model[1].bias.double()})
    return twin


@pytest.mark.parametrize("how", ["plain", "checkpointed", "routed", "small strips"])
@pytest.mark.parametrize("kind", UNPACKED)
def test_gradients_are_those_of_the_dense_network(kind: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "small strips":
        monkeypatch.setattr("deltaw.core.stretches.STRIP", 512)
    model = quantized(kind, torch.float32).train()
    board = deltaw.attach(model, LoraConfig(r=4, target_modules=["0"]), "a", seed=0)
    fill(board, "a", seed=3)
    x, gradient = randn(4, 64, requires_grad=True), randn(4, 8)
    wide = x.detach().double().requires_grad_()
    expected, = torch.autograd.grad(dense_twin(model, board)(wide), wide, gradient.double())
    with board.route(["a"] * 4) if how == "routed" else nullcontext():
        y = checkpoint(model, x, use_reentrant=False) if how == "checkpointed" else model(x)
        dx, dA, dB = torch.autograd.grad(y, [x, *board.parameters("a").values()], gradient)
    assert error(dx, expected) < 1e-5
    # dΔW = gᵀx; dA = s·BᵀdΔW, dB = s·dΔW Aᵀ
    g = gradient.double() @ model[1].weight.double()
    dW = g.t() @ x.double()
    A, B = (board.parameters("a")[f"0.lora_{which}"].double() for which in "AB")
    scale = board.adapter("a").config.scaling(4)
    assert error(dA, scale * B.t() @ dW) < 1e-5
    assert error(dB, scale * dW @ A.t()) < 1e-5


@pytest.mark.parametrize("kind", UNPACKED)
def test_a_batch_of_many_adapters_unpacks_a_layer_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized(kind, torch.float32).train()
    board = deltaw.attach(model, LoraConfig(r=2, target_modules=["0"]), "a", seed=0)
    for name in "bcd":
        board.add(name, LoraConfig(r=2, target_modules=["0"]), seed=1)
    for seed, name in enumerate("abcd"):
        fill(board, name, seed=seed)
    unpacked: list[int] = []
    strips = Packed.strips
    monkeypatch.setattr(Packed, "strips", lambda self, *rest: unpacked.append(1) or strips(self, *rest))
    x = randn(8, 64, requires_grad=True)
    with board.route(["a", "b", "c", "d"] * 2):
        y = model(x)
        assert len(unpacked) == 1
        y.sum().backward()
    assert len(unpacked) == 2
    for row, name in enumerate("abcd"):
        board.use(name)
        assert error(model(x)[row], y[row].detach().double()) < 1e-5


def test_layers_of_one_input_and_dropout_are_fused_too() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = quantized("nf4", torch.float32)[0], quantized("nf4", torch.float32)[0]

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) * self.k(x)

    model = Two().train()
    board = deltaw.attach(model, LoraConfig(r=2, target_modules=["q", "k"]), "a", seed=0)
    fill(board, "a", seed=1)
    x = randn(4, 64, requires_grad=True)
    apart = model(x)
    assert board.share_inputs(lambda: model(x)) == [("q", "k")]
    together = model(x)
    assert error(together, apart.detach().double()) < 1e-6
    assert type(together.grad_fn.next_functions[0][0]) is type(together.grad_fn.next_functions[1][0])
    assert together.grad_fn.next_functions[0][0] is together.grad_fn.next_functions[1][0]
    other = Two().train()
    dropped = deltaw.attach(other, LoraConfig(r=2, target_modules=["q", "k"], lora_dropout=0.5), "a", seed=0)
    fill(dropped, "a", seed=1)
    assert not torch.equal(other(x), other(x))
    assert torch.equal(other.eval()(x), other(x))


def test_a_saved_adapter_gives_the_same_on_the_base_loaded_again(tmp_path: Path) -> None:
    model = quantized("nf4", torch.float32)
    board = deltaw.attach(model, LoraConfig(r=4, target_modules=["0"]), "a", seed=0)
    fill(board, "a", seed=3)
    board.adapter("a").save(tmp_path)
    other, x = quantized("nf4", torch.float32), randn(3, 64)
    deltaw.attach(other, deltaw.load(tmp_path))
    assert torch.equal(other(x), model(x))
