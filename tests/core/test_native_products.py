"""The kernel's products with frozen weights against float64: sizes, layouts, biases, and who is asked."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltaw.core import native_low_rank
from deltaw.core.frozen import through_frozen, write_product

needs_kernel = pytest.mark.skipif(not native_low_rank.is_there(),
                                  reason="the kernel wants AVX512-BF16 without AMX, and a C compiler")
ROUNDED_ONCE = 2.0**-8
"""Of the largest number that a sum could reach: half of the last bit of a bfloat16, and float32's sums."""


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def is_near(got: Tensor, right: Tensor) -> bool:
    return bool(((got.double() - right).abs() <= ROUNDED_ONCE * right.abs() + 1e-4 * right.abs().max()).all())


@needs_kernel
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [
    (1, 32, 32), (7, 96, 64), (48, 64, 160), (500, 96, 96), (1030, 32, 192), (13, 2080, 96), (5, 1056, 1056)])
@pytest.mark.parametrize("layout", ["outputs first", "inputs first", "strip"])
@torch.no_grad()
def test_products_of_all_sizes(tokens: int, inputs: int, outputs: int, layout: str) -> None:
    W = randn(inputs, outputs, seed=1).t() if layout == "inputs first" else randn(outputs, inputs, seed=1)
    x, b, g = randn(tokens, inputs, seed=0), randn(outputs, seed=2), randn(tokens, outputs, seed=3)
    y = torch.full((tokens, 3 * outputs), torch.nan).bfloat16()[:, outputs:2 * outputs] if layout == "strip" \
        else torch.empty(tokens, outputs, dtype=torch.bfloat16)
    for bias in (None, b):
        assert native_low_rank.product(x, W, bias, y)
        assert is_near(y, x.double() @ W.double().t() + (0.0 if bias is None else bias.double()))
    dx = torch.full((tokens, inputs), torch.nan).bfloat16()
    assert native_low_rank.transposed_product(g, W, dx, add=False)
    assert is_near(dx, g.double() @ W.double())
    before = dx.clone()
    assert native_low_rank.transposed_product(g, W, dx, add=True)
    assert is_near(dx, before.double() + g.double() @ W.double())


@needs_kernel
@torch.no_grad()
def test_a_token_alone_and_any_number_of_threads_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    x, W = randn(700, 1056, seed=0), randn(96, 1056, seed=1)
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        y = torch.empty(700, 96, dtype=torch.bfloat16)
        assert native_low_rank.product(x, W, None, y)
        alone = torch.empty(1, 96, dtype=torch.bfloat16)
        assert native_low_rank.product(x[333:334], W, None, alone)
        assert torch.equal(alone[0], y[333])
        found.append(y)
    assert all(torch.equal(y, found[0]) for y in found)


@needs_kernel
@torch.no_grad()
def test_not_a_number_stays_in_its_row() -> None:
    x, W = randn(20, 64, seed=0), randn(96, 64, seed=1)
    x[7] = torch.nan
    y = torch.empty(20, 96, dtype=torch.bfloat16)
    write_product(x, W, None, y)
    assert y.isnan().any(1).tolist() == [row == 7 for row in range(20)]


@torch.no_grad()
def test_what_the_kernel_is_not_for_is_torchs() -> None:
    for x, W in ((randn(9, 33, seed=0), randn(64, 33, seed=1)), (randn(9, 32, seed=0), randn(40, 32, seed=1)),
                 (randn(9, 32, seed=0).float(), randn(64, 32, seed=1).float()),
                 (randn(9, 32, seed=0), randn(64, 64, seed=1)[:, ::2])):
        y, g = x.new_empty(len(x), len(W)), torch.ones(len(x), len(W), dtype=x.dtype)
        assert not native_low_rank.product(x, W, None, y)
        write_product(x, W, None, y)
        assert torch.equal(y, x @ W.t())
        assert torch.allclose(through_frozen([g], [W], x), g @ W)
