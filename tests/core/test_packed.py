"""Strips of a packed weight against bitsandbytes' own unpacking; products through them against dense algebra."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deltaw.core import packed as packing
from deltaw.core import stretches
from deltaw.core.frozen import Projection, Stripped, frozen_linear, reference
from deltaw.core.kernels import low_rank_linear
from deltaw.core.packed import Packed, Workspace, numbers_in, packed_tensor, packed_weight
from tests.device import DEVICE, cpu_only, randn

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def packed(kind: str, rows: int = 24, columns: int = 64, *, nested: bool = True,
           dtype: torch.dtype = torch.float32) -> Packed:
    W = randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns)).to(dtype)
    if kind == "int8":
        codes, absmax, _ = bnb.functional.int8_vectorwise_quant(W.half())
        return Packed("int8", codes, (rows, columns), absmax)
    codes, state = bnb.functional.quantize_4bit(W, quant_type=kind, compress_statistics=nested)
    weight = bnb.nn.Params4bit(codes, requires_grad=False, quant_state=state, bnb_quantized=True)
    found = packed_tensor(weight)
    assert found is not None
    return found


def theirs(W: Packed, dtype: torch.dtype) -> Tensor:
    """bitsandbytes' own functions."""
    if W.kind == "int8":
        return W.codes.to(dtype).mul_(W.absmax.unsqueeze(1).mul(1.0 / 127.0))
    state = copy.copy(W.state)
    state.dtype = dtype
    return bnb.functional.dequantize_4bit(W.codes, state)


@pytest.mark.parametrize("shape", [(24, 64), (7, 192), (5, 130), (64, 32), (3, 33)], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strips_have_the_bits_of_bitsandbytes(kind: str, dtype: torch.dtype, shape: tuple[int, int],
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    if math.prod(shape) % 2 and kind != "int8":
        pytest.skip("bitsandbytes packs two numbers in a byte")
    monkeypatch.setattr(stretches, "STRIP", 256)
    for nested in (True, False):
        W = packed(kind, *shape, nested=nested, dtype=dtype)
        workspace, expected = Workspace(), theirs(W, dtype)
        rows = [(rows, strip.clone()) for rows, strip in W.strips(dtype, workspace)]
        assert torch.equal(torch.cat([strip for _, strip in rows]), expected)
        assert [rows.start for rows, _ in rows] == [0, *(rows.stop for rows, _ in rows[:-1])]
        assert rows[-1][0].stop == shape[0]
        assert torch.equal(W.dense(dtype), expected)
        if kind != "int8" and shape[1] == 32:
            continue  # bitsandbytes reads such rows with another block's scale, and so do we where it computes
        at = [0, 1, math.prod(shape) // 2, math.prod(shape) - 1]
        wide = theirs(W, torch.float32).view(-1)
        assert torch.allclose(torch.stack([W.element(i) for i in at]), wide[at], rtol=1e-6, atol=0)


@cpu_only("elsewhere a layer is one strip")
def test_one_memory_serves_all_strips_of_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stretches, "STRIP", 512)
    workspace, W = Workspace(), packed("nf4")
    places = {strip.data_ptr() for _ in range(3) for _, strip in W.strips(torch.float32, workspace)}
    assert len(places) == 1
    assert workspace.memory is not None
    assert workspace.memory.numel() <= 512
    assert copy.deepcopy(workspace).memory is None
    assert pickle.loads(pickle.dumps(workspace)).memory is None


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_without_the_native_kernel_bitsandbytes_unpacks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_native", lambda *_: None)
    W = packed(kind)
    x = randn(5, 64)
    y = x.new_empty(5, W.shape[0])
    Stripped(W, Workspace()).write_product(x, None, y)
    assert torch.allclose(y, x @ theirs(W, x.dtype).t(), atol=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("bias", [False, True])
def test_products_and_gradients_are_those_of_dense_float64(kind: str, bias: bool,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stretches, "STRIP", 512)
    workspace = Workspace()
    weights = [packed(kind, 24), packed(kind, 40)]
    parts = [Projection(Stripped(W, workspace), randn(W.shape[0]) if bias else None,
                        randn(3, 64, requires_grad=True), randn(W.shape[0], 3, requires_grad=True), 0.5)
             for W in weights]
    x = randn(2, 5, 64, requires_grad=True)
    leaves = [x, *(t for p in parts for t in (p.A, p.B))]
    wide = {id(t): t.detach().double().requires_grad_() for t in leaves}
    exact = [wide[id(x)] @ (theirs(W, torch.float32).double() + p.scale * wide[id(p.B)] @ wide[id(p.A)]).t()
             + (0 if p.b is None else p.b.double()) for W, p in zip(weights, parts, strict=True)]
    outputs = low_rank_linear(x, parts)
    for got, expected in zip([*outputs, *reference(x, parts)], exact * 2, strict=True):
        assert torch.allclose(got.double(), expected, rtol=1e-5, atol=1e-4)
    gradient = [torch.randn_like(y) for y in outputs]
    found = torch.autograd.grad(outputs, leaves, gradient)
    wanted = torch.autograd.grad(exact, [wide[id(t)] for t in leaves], [g.double() for g in gradient])
    for got, expected in zip(found, wanted, strict=True):
        assert torch.allclose(got.double(), expected, rtol=1e-5, atol=2e-4)
    alone = frozen_linear(x, Stripped(weights[0], workspace), parts[0].b)
    g = torch.randn_like(alone)
    dx, = torch.autograd.grad(alone, x, g)
    assert torch.allclose(dx, g @ theirs(weights[0], g.dtype), atol=1e-4)


def test_a_second_derivative_does_not_read_memory_that_was_used_again() -> None:
    parts = [Projection(Stripped(packed("nf4"), Workspace()), None, randn(3, 64, requires_grad=True),
                        randn(24, 3, requires_grad=True), 0.5)]
    x = randn(5, 64, requires_grad=True)

    def second(outputs: tuple[Tensor, ...]) -> Tensor:
        first, = torch.autograd.grad(outputs[0].sin().sum(), x, create_graph=True)
        again, = torch.autograd.grad(first.square().sum(), x)
        return again

    assert torch.allclose(second(low_rank_linear(x, parts)), second(reference(x, parts)), rtol=1e-3, atol=1e-2)


def test_other_layers_are_not_packed() -> None:
    assert packed_weight(nn.Linear(4, 4)) is None
    assert packed_tensor(torch.zeros(3, dtype=torch.int8)) is None
    assert numbers_in(torch.zeros(3, 4)) == 12
    layer: Any = bnb.nn.Linear4bit(64, 32, quant_type="nf4").to(DEVICE)
    assert numbers_in(layer.weight) == 64 * 32
    found = packed_weight(layer)
    assert found is not None
    assert found.shape == (32, 64)

    class Scaled(bnb.nn.Linear4bit):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    assert packed_weight(Scaled(64, 32, quant_type="nf4").to(DEVICE)) is None
