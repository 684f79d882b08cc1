"""The loss's kernel beside its definition in float64, and in the loss that uses it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.train import native_loss
from deltaw.train.cross_entropy import OutputLayer, token_loss, token_losses
from deltaw.train.terms import Terms

HALF = torch.bfloat16
pytestmark = pytest.mark.skipif(not native_loss.is_there(),
                                reason="the kernel wants AVX512-BF16 without AMX, and a C compiler")
TERMS = [Terms(), Terms(smoothing=0.1), Terms(z_loss=0.01), Terms(smoothing=0.2, z_loss=0.03)]


def random(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(HALF)


def words(rows: int, V: int, seed: int = 1) -> Tensor:
    """Targets, the first and the last word among them."""
    targets_N = torch.randint(0, V, (rows,), generator=torch.Generator().manual_seed(seed))
    targets_N[0], targets_N[-1] = 0, V - 1
    return targets_N


def by_kernel(z_NV: Tensor, targets_N: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """The losses, and dz."""
    dz_NV = z_NV.clone()
    return native_loss.losses(dz_NV, targets_N, terms, gradients=True), dz_NV


def by_definition(z_NV: Tensor, targets_N: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """The same in float64. What is one less than a probability is summed of the others."""
    z_NV, column_N1 = z_NV.double(), targets_N.unsqueeze(1)
    eps, zeta, lse_N1 = terms.smoothing, terms.z_loss, z_NV.logsumexp(1, keepdim=True)
    others_N1 = z_NV.scatter(1, column_N1, -torch.inf).logsumexp(1, keepdim=True)
    unlikely_N1 = F.softplus(others_N1 - z_NV.gather(1, column_N1))  # -log p_t
    losses_N1 = (1 - eps) * unlikely_N1 + eps * (lse_N1 - z_NV.mean(1, keepdim=True)) + zeta * lse_N1.square()
    p_NV = (z_NV - lse_N1).exp()
    less_NV = p_NV.scatter(1, column_N1, -(others_N1 - lse_N1).exp())
    share_NV = torch.full_like(p_NV, -eps / z_NV.shape[1]).scatter_add_(1, column_N1, torch.full_like(lse_N1, eps))
    return losses_N1.squeeze(1), less_NV + share_NV + 2 * zeta * lse_N1 * p_NV


def assert_exact(z_NV: Tensor, targets_N: Tensor, terms: Terms) -> None:
    """Losses to float32's accuracy, gradients to one rounding to bfloat16."""
    (losses_N, dz_NV), (true_N, d_true_NV) = (f(z_NV, targets_N, terms) for f in (by_kernel, by_definition))
    assert torch.allclose(losses_N.double(), true_N, rtol=5e-6, atol=1e-37)
    # Half of the last bit, what is left of p - ε/V in float32, and what is too small for a number.
    allowed_NV = d_true_NV.abs() * (2**-8 * 1.001) + terms.smoothing / z_NV.shape[1] * 1e-5 + 1e-37
    assert bool(((dz_NV - d_true_NV).abs() <= allowed_NV).all())


@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (1, 50), (23, 17), (5, 64), (3, 2049), (40, 4095), (4, 49152)],
                         ids=str)
@pytest.mark.parametrize("scale", [0.01, 2.0, 30.0])
def test_the_definitions_numbers(terms: Terms, shape: tuple[int, int], scale: float) -> None:
    assert_exact(random(*shape, scale=scale), words(*shape), terms)


def test_a_word_that_is_nearly_certain_keeps_its_digits() -> None:
    z_NV, targets_N = random(6, 1000), words(6, 1000)
    for row, margin in enumerate((8.0, 16.0, 24.0, 40.0, 60.0, 80.0)):
        z_NV[row, targets_N[row]] = margin
    assert_exact(z_NV, targets_N, Terms())
    assert bool((by_kernel(z_NV, targets_N, Terms())[0] > 0).all())


def test_many_equal_logits_are_summed_exactly() -> None:
    z_NV = torch.full((1, 151_936), -0.35, dtype=HALF)
    z_NV[0, 7] = 0
    assert_exact(z_NV, torch.tensor([7]), Terms(smoothing=0.1))


@pytest.mark.parametrize("lay", [lambda t: t[:, 5:38], lambda t: t[::2], lambda t: t[3:4], lambda t: t[:, :1]])
def test_rows_that_lie_apart(lay: Callable[[Tensor], Tensor]) -> None:
    around = random(9, 99)
    z_NV, before = lay(around), around.clone()
    targets_N = words(*z_NV.shape)
    expected = by_kernel(z_NV.contiguous(), targets_N, TERMS[3])
    assert torch.equal(native_loss.losses(z_NV, targets_N, TERMS[3], gradients=True), expected[0])
    assert torch.equal(z_NV, expected[1])
    lay(before).copy_(z_NV)
    assert torch.equal(around, before)  # and nothing beside them was written


@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_logits_stay_where_no_gradient_is_wanted(terms: Terms) -> None:
    z_NV, targets_N = random(9, 333), words(9, 333)
    before = z_NV.clone()
    losses_N = native_loss.losses(z_NV, targets_N, terms, gradients=False)
    assert torch.equal(z_NV, before)
    assert torch.equal(losses_N, by_kernel(z_NV, targets_N, terms)[0])


@pytest.mark.parametrize("target", [0, 1])
def test_numbers_at_the_ends_are_torchs(target: int) -> None:
    z_NV = random(12, 40)
    for row, value in enumerate((torch.inf, -torch.inf, torch.nan, 3e38, -3e38)):
        z_NV[row, 0] = value
    z_NV[5] = z_NV[6, :20] = -torch.inf
    z_NV[7, 1:] = -torch.inf
    z_NV[8] = 3e38
    z_NV[9], z_NV[9, 1] = -3e38, torch.inf
    z_NV[10, 2:4] = torch.inf
    leaf, targets_N = z_NV.double().requires_grad_(), torch.full((12,), target)
    true_N = Terms().each(leaf, targets_N)
    true_NV, = torch.autograd.grad(true_N.sum(), leaf)
    losses_N, dz_NV = by_kernel(z_NV, targets_N, Terms())
    assert torch.allclose(losses_N, true_N.float(), rtol=1e-5, equal_nan=True)
    assert torch.allclose(dz_NV, true_NV.to(HALF), rtol=0.01, atol=1e-30, equal_nan=True)


def test_a_row_has_the_same_bits_alone_and_by_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    z_NV, targets_N, every = random(90, 3001), words(90, 3001), []
    for threads in (1, 2, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        every.append(by_kernel(z_NV, targets_N, TERMS[3]))
    alone = by_kernel(z_NV[40:41], targets_N[40:41], TERMS[3])
    z_NV[3, 9] = torch.nan
    spoiled = by_kernel(z_NV, targets_N, TERMS[3])
    for first, second, third, one, nan in zip(*every, alone, spoiled, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, third)
        assert torch.equal(first[40:41], one)
        assert bool(nan[3].isnan().all())
        assert torch.equal(first[4:], nan[4:])
        assert torch.equal(first[:3], nan[:3])


@pytest.mark.parametrize("target", [-100, -1, 50])
def test_a_target_that_is_no_word_is_refused(target: int) -> None:
    z_NV = random(3, 50)
    before = z_NV.clone()
    with pytest.raises(IndexError, match="none of the 50 words"):
        native_loss.losses(z_NV, torch.tensor([1, target, 2]), Terms(), gradients=True)
    assert torch.equal(z_NV, before)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The kernel's calls, and whether they wanted gradients."""
    calls: list[bool] = []

    def losses(*args: Any, gradients: bool) -> Tensor:
        calls.append(gradients)
        return own(*args, gradients=gradients)

    own = native_loss.losses
    monkeypatch.setattr(native_loss, "losses", losses)
    return calls


@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_in_the_loss_of_tokens(terms: Terms, asked: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    output = OutputLayer(nn.Linear(32, 96).to(HALF).requires_grad_(False))
    h_NI, targets_N = random(23, 32).requires_grad_(), words(23, 96)

    def found() -> list[Tensor]:
        each_N = token_losses(h_NI, targets_N, output, terms)
        total = token_loss(h_NI, targets_N, output, terms)
        with torch.no_grad():
            alone = token_loss(h_NI, targets_N, output, terms)
        return [each_N.detach(), total.detach(), alone, *torch.autograd.grad(total, h_NI)]

    mine = found()
    assert asked == [True, True, False]
    monkeypatch.setattr(native_loss, "is_there", lambda: False)
    theirs = found()
    assert asked == [True, True, False]
    for one, other in zip(mine[:3], theirs[:3], strict=True):
        assert torch.allclose(one, other, rtol=1e-5)
    assert float((mine[3] - theirs[3]).norm()) <= 0.01 * float(theirs[3].norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_other_numbers_are_not_its(dtype: torch.dtype, asked: list[bool]) -> None:
    output = OutputLayer(nn.Linear(32, 96).to(dtype).requires_grad_(False))
    token_loss(random(5, 32).to(dtype).requires_grad_(), words(5, 96), output).backward()
    assert asked == []
