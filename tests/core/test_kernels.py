"""The fused product against the plain operations next to it, and against dense float64 algebra."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from deltaw.core.frozen import Projection, reference
from deltaw.core.kernels import gradient_of_weight_is_shorter, low_rank_linear
from tests.device import randn

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Largest difference, as a share of the largest value."""


def projections(outputs: Sequence[int], inputs: int = 12, rank: int = 3, dtype: torch.dtype = torch.float32,
                factors: torch.dtype | None = None, *, bias: bool = False, seed: int = 0) -> list[Projection]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        # Outputs near 1: the sine of a large number makes much of how it was rounded.
        return randn(shape, generator=generator, dtype=torch.float64) / shape[-1]**0.5

    made = []
    for i, width in enumerate(outputs):
        r = rank + i
        A, B = (draw(*shape).to(factors or dtype).requires_grad_() for shape in ((r, inputs), (width, r)))
        made.append(Projection(draw(width, inputs).to(dtype), draw(width).to(dtype) if bias else None, A, B, 0.5 + i))
    return made


def dense(x: Tensor, parts: Sequence[Projection]) -> tuple[Tensor, ...]:
    """x (W + sBA)ᵀ + b in float64, BA formed."""
    wide = [Projection(*(t if t is None or isinstance(t, float) else t.double() for t in p)) for p in parts]
    return tuple(x.double() @ (p.W + p.scale * p.B @ p.A).t() + (0 if p.b is None else p.b) for p in wide)


def gradients(outputs: Sequence[Tensor], x: Tensor, parts: Sequence[Projection]) -> list[Tensor]:
    loss = sum(((i + 1) * y.double().sin()).sum() for i, y in enumerate(outputs))
    assert isinstance(loss, Tensor)
    return list(torch.autograd.grad(loss, [x, *(t for p in parts for t in (p.A, p.B))]))


def far(got: Tensor, expected: Tensor) -> float:
    with torch.no_grad():
        return float((got.double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("outputs", [[7], [5, 8, 5]], ids=["one", "three"])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_the_dense_product_and_its_gradients(dtype: torch.dtype, outputs: list[int], bias: bool) -> None:
    parts = projections(outputs, dtype=dtype, bias=bias)
    x = randn(2, 6, 12, dtype=dtype, requires_grad=True)
    fused, exact = low_rank_linear(x, parts), dense(x, parts)
    for got, expected in zip(fused, exact, strict=True):
        assert got.dtype == dtype
        assert far(got, expected) < TOLERANCE[dtype]
    # The same gradients of the outputs for both: in bf16 the sines of the two would differ by much more.
    for got, expected in zip(torch.autograd.grad(fused, [x, *(t for p in parts for t in (p.A, p.B))],
                                                 [torch.ones_like(y) for y in fused]),
                             torch.autograd.grad(exact, [x, *(t for p in parts for t in (p.A, p.B))],
                                                 [torch.ones_like(y) for y in exact]), strict=True):
        assert far(got, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize(("dtype", "factors"), [(torch.float32, None), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("rank", [1, 3, 40], ids=["rank1", "low", "through the weight"])
def test_it_agrees_with_the_plain_operations(dtype: torch.dtype, factors: torch.dtype | None, rank: int) -> None:
    parts = projections([9, 30], inputs=24, rank=rank, dtype=dtype, factors=factors)
    x = randn(70, 24, dtype=dtype, requires_grad=True)
    for got, expected in zip(gradients(low_rank_linear(x, parts), x, parts),
                             gradients(reference(x, parts), x, parts), strict=True):
        assert got.dtype == expected.dtype
        assert far(got, expected) < (2e-6 if dtype == torch.float32 else 0.1)


def test_the_shorter_way_is_taken_where_the_rank_is_high() -> None:
    assert gradient_of_weight_is_shorter(70, 24, 9, 40)
    assert not gradient_of_weight_is_shorter(70, 24, 9, 3)
    assert not gradient_of_weight_is_shorter(1, 24, 9, 40)


def test_first_and_second_derivatives_by_differences() -> None:
    parts = projections([3, 4], inputs=5, rank=2, dtype=torch.float64, bias=True)
    x = randn(4, 5, dtype=torch.float64, requires_grad=True)

    def outputs(x: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
        return low_rank_linear(x, [p._replace(A=A, B=B) for p, A, B in zip(parts, flat[::2], flat[1::2], strict=True)])

    flat = [t for p in parts for t in (p.A, p.B)]
    assert torch.autograd.gradcheck(outputs, (x, *flat))
    assert torch.autograd.gradgradcheck(outputs, (x, *flat))


@pytest.mark.parametrize("frozen", ["x", "A", "B", "A of one", "B and x"])
def test_what_needs_no_gradient_gets_none_and_the_rest_is_right(frozen: str) -> None:
    parts = projections([5, 7])
    x = randn(6, 12, requires_grad="x" not in frozen)
    for i, p in enumerate(parts):
        if "A" in frozen and not ("one" in frozen and i):
            p.A.requires_grad_(False)
        if "B" in frozen:
            p.B.requires_grad_(False)
    wanted = [t for t in (x, *(t for p in parts for t in (p.A, p.B))) if t.requires_grad]
    both = [torch.autograd.grad(sum(y.sin().sum() for y in run(x, parts)), wanted)  # type: ignore[arg-type]
            for run in (low_rank_linear, reference)]
    for got, expected in zip(*both, strict=True):
        assert far(got, expected) < 1e-6


def test_an_output_that_nobody_uses() -> None:
    parts = projections([5, 7, 6])
    x = randn(6, 12, requires_grad=True)
    wanted = [x, parts[0].A, parts[0].B, parts[2].B]
    both = [torch.autograd.grad(y[0].sin().sum() + y[2].sin().sum(), wanted)
            for y in (low_rank_linear(x, parts), reference(x, parts))]
    for got, expected in zip(*both, strict=True):
        assert far(got, expected) < 1e-6
    low_rank_linear(x, parts)[1].sum().backward()
    assert parts[0].B.grad is None or not parts[0].B.grad.any()


def test_dropout_drops_the_input_of_the_change_alone() -> None:
    part, = projections([5], inputs=400, rank=6)
    x = randn(3, 400, requires_grad=True)
    torch.manual_seed(1)
    y, = low_rank_linear(x, [part], dropout=0.25)
    torch.manual_seed(1)
    keep = torch.empty_like(x, dtype=torch.bool).bernoulli_(0.75)
    assert 0.7 < float(keep.float().mean()) < 0.8
    expected = x @ part.W.t() + part.scale * (x * keep / 0.75) @ part.A.t() @ part.B.t()
    assert far(y, expected) < 1e-6
    wanted = [x, part.A, part.B]
    for got, true in zip(torch.autograd.grad(y.sin().sum(), wanted), torch.autograd.grad(expected.sin().sum(), wanted),
                         strict=True):
        assert far(got, true) < 1e-5


def kept_of_its_size(x: Tensor, parts: Sequence[Projection]) -> list[int]:
    """Addresses of the tensors as large as x that the layer keeps for its backward pass."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        low_rank_linear(x, parts)
    return [t.data_ptr() for t in kept if t.numel() >= x.numel()]


def test_it_keeps_the_input_and_nothing_else_of_its_size() -> None:
    parts = projections([64, 64, 96], inputs=64, rank=2)
    x = randn(500, 64, requires_grad=True)
    assert kept_of_its_size(x, parts) == [x.data_ptr()]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_with_frozen_A_the_input_is_not_kept_and_its_product_for_dA_not_made(dropout: float) -> None:
    parts = projections([64, 96], inputs=64, rank=2)
    for part in parts:
        part.A.requires_grad_(False)
    x = randn(500, 64, requires_grad=True)
    assert kept_of_its_size(x, parts) == []
    torch.manual_seed(1)
    fused = low_rank_linear(x, parts, dropout)
    torch.manual_seed(1)
    keep = torch.ones_like(x) if not dropout else torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout)
    plain = [x @ p.W.t() + p.scale * (x * keep / (1 - dropout)) @ p.A.t() @ p.B.t() for p in parts]
    wanted, ones = [x, *(p.B for p in parts)], [torch.ones_like(y) for y in plain]
    with torch.profiler.profile() as profile:
        mine = torch.autograd.grad(fused, wanted, ones)
    # dH of each part, g W of the first, and dB of each; then onto dx: g W of the second, and dH A.
    products = [event.name for event in profile.events() if event.name in ("aten::mm", "aten::addmm_")]
    assert len(products) <= 2 + 1 + 2 + 2
    for got, expected in zip(mine, torch.autograd.grad(plain, wanted, ones), strict=True):
        assert far(got, expected) < 1e-5


def test_a_second_derivative_with_frozen_A_is_refused_and_not_wrong() -> None:
    part, = projections([5], inputs=12, rank=2)
    part.A.requires_grad_(False)
    x = randn(6, 12, requires_grad=True)
    y, = low_rank_linear(x, [part])
    with pytest.raises(NotImplementedError, match="let A require a gradient"):
        torch.autograd.grad(y.sin().sum(), [part.B], create_graph=True)
    y, = low_rank_linear(x, [part._replace(B=part.B.detach())])  # no adapter is trained, only what lies before it
    dx, = torch.autograd.grad(y.sin().sum(), [x], create_graph=True)
    mine, = torch.autograd.grad(dx.square().sum(), [x])
    plain, = reference(x, [part._replace(B=part.B.detach())])
    dx, = torch.autograd.grad(plain.sin().sum(), [x], create_graph=True)
    assert far(mine, torch.autograd.grad(dx.square().sum(), [x])[0]) < 1e-5
