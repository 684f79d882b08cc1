"""Products of the kernel with weights in codes, which it unpacks itself: the bits of those with the unpacked weight."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from deltaw.core import native_linear, native_low_rank
from deltaw.core.frozen import Projection, Stripped, frozen_linear, reference
from deltaw.core.kernels import low_rank_linear
from deltaw.core.native_low_rank import Part, Segment
from deltaw.core.native_weight import is_readable
from deltaw.core.packed import Packed, Workspace
from deltaw.core.tables import pack_table

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.skipif(not native_low_rank.is_there(),
                       reason="the kernel wants AVX512-BF16 without AMX, and a C compiler")]
KINDS = ["nf4", "nf4, plain scales", "fp4", "int8"]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def packed(kind: str, outputs: int, inputs: int, block: int = 64) -> Packed:
    W = randn(outputs, inputs, seed=outputs + inputs) * torch.logspace(-2, 2, outputs).unsqueeze(1).bfloat16()
    if kind == "int8":
        table = pack_table(W, (outputs, inputs), torch.device("cpu"))
        return Packed("int8", table.data, (outputs, inputs), table.absmax)
    codes, state = bnb.functional.quantize_4bit(W, quant_type=kind[:3], compress_statistics="," not in kind,
                                                blocksize=block)
    return Packed(kind[:3], codes, (outputs, inputs), state.absmax, state)  # type: ignore[arg-type]


def unpacked(W: Packed) -> Tensor:
    """bitsandbytes' own numbers; of 8 bits codes and scales in float32, rounded once."""
    if W.kind == "int8":
        return (W.codes.float() * W.absmax.mul(1.0 / 127.0).unsqueeze(1)).bfloat16()
    state = copy.copy(W.state)
    state.dtype = torch.bfloat16
    dense: Tensor = bnb.functional.dequantize_4bit(W.codes, state)
    return dense


def both(W: Packed, x: Tensor, b: Tensor | None, g: Tensor, before: Tensor) -> list[tuple[Tensor, ...]]:
    """y, dx, and dx added to what there was, with the codes and with the unpacked weight."""
    found = []
    for own in (W, unpacked(W)):
        y, dx, added = x.new_full((len(x), W.shape[0]), torch.nan), torch.full_like(x, torch.nan), before.clone()
        assert native_low_rank.product(x, own, b, y)
        assert native_low_rank.transposed_product(g, own, dx, add=False)
        assert native_low_rank.transposed_product(g, own, added, add=True)
        found.append((y, dx, added))
    return found


@pytest.mark.parametrize(("tokens", "outputs", "inputs"), [
    (1, 32, 64), (7, 96, 192), (70, 160, 320), (1030, 64, 128), (13, 1056, 64), (5, 64, 1088), (48, 2080, 2112)])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_products_have_the_bits_of_those_with_the_unpacked_weight(kind: str, tokens: int, outputs: int,
                                                                  inputs: int) -> None:
    W, x, g = packed(kind, outputs, inputs), randn(tokens, inputs), randn(tokens, outputs, seed=1)
    for b in (None, randn(outputs, seed=2)):
        codes, dense = both(W, x, b, g, randn(tokens, inputs, seed=3))
        assert all(torch.equal(a, b) for a, b in zip(codes, dense, strict=True))
    exact = x.double() @ unpacked(W).double().t()
    y = x.new_empty(tokens, outputs)
    native_low_rank.product(x, W, None, y)
    assert bool(((y.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-4 * exact.abs().amax(0)).all())


@pytest.mark.parametrize("block", [128, 512, 1024])
@torch.no_grad()
def test_blocks_of_all_sizes(block: int) -> None:
    W, x, g = packed("nf4", 96, 1024, block), randn(9, 1024), randn(9, 96, seed=1)
    codes, dense = both(W, x, None, g, randn(9, 1024, seed=3))
    assert all(torch.equal(a, b) for a, b in zip(codes, dense, strict=True))


@torch.no_grad()
def test_int8_rows_that_are_no_whole_vectors() -> None:
    W, x, g = packed("int8", 64, 96), randn(9, 96), randn(9, 64, seed=1)
    codes, dense = both(W, x, None, g, randn(9, 96, seed=3))
    assert all(torch.equal(a, b) for a, b in zip(codes, dense, strict=True))


@torch.no_grad()
def test_codes_that_the_kernel_is_not_for_go_through_strips() -> None:
    for W in (packed("nf4", 32, 32), packed("nf4", 64, 192, block=128), packed("nf4", 48, 64)):
        x, g = randn(9, W.shape[1]), randn(9, W.shape[0], seed=1)
        y, dx = x.new_empty(9, W.shape[0]), torch.empty_like(x)
        assert not native_low_rank.product(x, W, None, y)
        assert not native_low_rank.transposed_product(g, W, dx, add=False)
        own = Stripped(W, Workspace())
        own.write_product(x, None, y)
        assert torch.allclose(y, x @ W.dense(x.dtype).t(), rtol=2.0**-7, atol=1e-1)
        assert torch.allclose(own.add_transposed(g, None), g @ W.dense(x.dtype), rtol=2.0**-7, atol=1.0)
    assert not is_readable(Packed("nf4", randn(4, 4), (32, 64), randn(4), packed("nf4", 32, 64).state))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_with_changes_have_the_bits_of_those_over_the_unpacked_weight(kind: str) -> None:
    weights, x = [packed(kind, outputs, 128) for outputs in (96, 64)], randn(90, 128)
    segments = [Segment(start, stop, [Part(i, randn(rank, 128, seed=rank, dtype=torch.float32),
                                           randn(W.shape[0], rank, seed=rank + 1, dtype=torch.float32), 0.5)
                                      for i, W in enumerate(weights)])
                for start, stop, rank in ((0, 20, 3), (20, 90, 8))]
    g = [randn(90, W.shape[0], seed=5) for W in weights]
    found = []
    for own in ([Stripped(W, Workspace()) for W in weights], [unpacked(W) for W in weights]):
        y = [x.new_empty(90, W.shape[0]) for W in weights]
        h = native_linear.outputs(x, y, own, [None, None], native_low_rank.packed(segments))  # type: ignore[arg-type]
        dx, of_factors = native_linear.gradients(x, h, g, own, segments)  # type: ignore[arg-type]
        found.append([*y, h, dx, *of_factors])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_no_strip_is_unpacked_where_the_kernel_reads_codes(kind: str) -> None:
    workspace = Workspace()
    W = Stripped(packed(kind, 96, 128), workspace)
    part = Projection(W, randn(96), randn(4, 128).requires_grad_(), randn(96, 4).requires_grad_(), 2.0)
    x = randn(3, 7, 128).requires_grad_()
    leaves = [x, part.A, part.B]
    y, = low_rank_linear(x, [part])
    found = torch.autograd.grad(y, leaves, randn(3, 7, 96, seed=9))
    assert frozen_linear(x, W, part.b).grad_fn is not None
    assert workspace.memory is None
    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact, = reference(wide[0], [Projection(unpacked(W.packed).double(), randn(96).double(), *wide[1:], part.scale)])
    right = torch.autograd.grad(exact, wide, randn(3, 7, 96, seed=9).double())
    for got, expected in zip((y, *found), (exact, *right), strict=True):
        assert float(((got.double() - expected).norm() / expected.norm()).detach()) < 0.004
