"""The maths of `core.methods.lora` and `core.geometry`, on tensors alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltaw.core import Adapter, Geometry, LoraConfig, SiteDelta
from deltaw.core.methods import lora
from tests.device import DEVICE, randn

GEOMETRIES = [
    Geometry(kind="linear", shape=(7, 5)), Geometry(kind="linear", shape=(5, 7), transposed=True),
    Geometry(kind="attention", shape=(9, 3)), Geometry(kind="embedding", shape=(11, 4)),
    Geometry(kind="conv", shape=(6, 2, 3)), Geometry(kind="conv", shape=(6, 2, 3, 2), groups=2),
    Geometry(kind="conv", shape=(4, 1, 2, 3, 2), groups=4), Geometry(kind="parameter", shape=(7, 5)),
    Geometry(kind="parameter", shape=(3, 7, 5)), Geometry(kind="parameter", shape=(3, 5, 7), transposed=True),
    Geometry(kind="linear", shape=(9, 4), slices=((0, 3), (6, 9))),
    Geometry(kind="linear", shape=(4, 9), slices=((1, 2), (2, 9)), transposed=True)]
each_geometry = pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: f"{g.kind}-{g.shape}")


def factors(geometry: Geometry, rank: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    shape_A, shape_B = geometry.factor_shapes(rank)
    return randn(shape_A).to(dtype), randn(shape_B).to(dtype)


@each_geometry
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_shapes_rank_and_count_agree(geometry: Geometry, rank: int) -> None:
    A, B = factors(geometry, rank)
    assert geometry.rank_of(A, B) == rank
    assert geometry.fits(A, B)
    assert not geometry.fits(A, B[:-1])
    assert not geometry.fits(A[..., :-1], B)
    assert geometry.count(rank) == A.numel() + B.numel()
    delta = lora.delta_weight(A, B, 1.0, geometry)
    assert delta.shape == geometry.shape
    matrices = delta if geometry.experts > 1 else delta.flatten(1).unsqueeze(0)
    widths = [stop - start for start, stop in geometry.slices or ((0, geometry.out_features),)]
    expected = min(sum(min(rank, geometry.in_features, width) for width in widths), geometry.in_features)
    for matrix in matrices:
        assert torch.linalg.matrix_rank(matrix.double(), rtol=1e-5) == expected


@each_geometry
def test_the_start_changes_nothing(geometry: Geometry) -> None:
    for how in (True, "gaussian", False):
        A, B = factors(geometry, 3)
        lora.initialise(A, B, how, geometry, 3, torch.Generator(DEVICE).manual_seed(1))
        delta = lora.delta_weight(A, B, 2.0, geometry)
        assert bool(delta.count_nonzero()) is (how is False)
        drawn = [t for t in (A, B) if t.count_nonzero()]
        assert len(drawn) == (2 if how is False else 1)
        assert len(drawn[0].unique()) == drawn[0].numel()


def test_the_start_has_the_paper_s_spread() -> None:
    geometry = Geometry(kind="linear", shape=(8, 4096))
    A, B = factors(geometry, 64)
    lora.initialise(A, B, True, geometry, 64)
    assert 0.99 / 64 < A.abs().max() <= 1 / 64
    lora.initialise(A, B, "gaussian", geometry, 64)
    assert abs(float(A.std()) * 64 - 1) < 0.01


@each_geometry
def test_delta_is_at_least_float32(geometry: Geometry) -> None:
    A, B = factors(geometry, 2, torch.bfloat16)
    expected = lora.delta_weight(A.float(), B.float(), 0.5, geometry)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        got = lora.delta_weight(A, B, 0.5, geometry)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)
    assert lora.delta_weight(A.double(), B, 0.5, geometry).dtype == torch.float64


def test_a_grouped_convolution_with_an_ungrouped_A_has_no_delta() -> None:
    geometry = Geometry(kind="conv", shape=(6, 2, 3), groups=2)
    A, B = randn(4, 4, 3), randn(6, 2, 1)
    assert geometry.is_dense_grouped(A)
    assert geometry.fits(A, B)
    assert not geometry.fits(A, randn(6, 4, 1))
    with pytest.raises(ValueError, match="no ΔW"):
        lora.delta_weight(A, B, 1.0, geometry)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 3), st.integers(1, 3))
def test_sliced_B_is_spread_and_gathered(sizes: list[int], gap: int, rank: int) -> None:
    slices, at = [], gap
    for size in sizes:
        slices.append((at, at + size))
        at += size + gap
    geometry = Geometry(kind="linear", shape=(at + 1, 5), slices=tuple(slices))
    _, B = factors(geometry, rank)
    spread = geometry.dense_out(B)
    assert spread.shape == (at + 1, rank * len(slices))
    assert int(spread.count_nonzero()) == B.numel()
    gathered = geometry.compact_out(spread)
    assert gathered is not None
    assert torch.equal(gathered, B)
    spread[-1, 0] = 1.0
    assert geometry.compact_out(spread) is None


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5), (2, 0, 5)])
def test_products_of_any_leading_shape(shape: tuple[int, ...], grad: bool) -> None:
    A, B = factors(Geometry(kind="linear", shape=(7, 5)), 2)
    x, y = randn(shape), randn(*shape[:-1], 7)
    expected = y + 0.5 * (x @ A.t() @ B.t())
    with torch.set_grad_enabled(grad):
        assert torch.allclose(lora.add_low_rank(y.clone(), x, A, B, 0.5), expected, atol=1e-5)
        strided = y.new_empty(*shape[:-1], 14)[..., ::2].copy_(y)
        assert torch.allclose(lora.add_low_rank(strided, x, A, B, 0.5), expected, atol=1e-5)


def test_an_adapter_is_a_value() -> None:
    geometry = Geometry(kind="linear", shape=(7, 5))
    A, B = factors(geometry, 2)
    config = LoraConfig(r=8, lora_alpha=6, target_modules=["q"])
    adapter = Adapter(config, {"q": SiteDelta(geometry, {"lora_A": A, "lora_B": B})})
    assert adapter.scaling("q") == 3.0  # the tensors' own rank counts, not the config's
    assert torch.allclose(adapter.delta("q"), 3 * B @ A, atol=1e-5)
    assert adapter.num_parameters == 24
    half = adapter.to(torch.bfloat16)
    assert half.sites["q"].A.dtype == torch.bfloat16
    assert adapter.sites["q"].A is A
