"""The gate's kernel beside torch's operations and float64, alone and in the feed-forwards that use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deltaw.bases import native_rows
from deltaw.bases.gated import gated_modules, product_made_again

HALF = torch.bfloat16
pytestmark = pytest.mark.skipif(not native_rows.fit(torch.empty(1, dtype=HALF)),
                                reason="the kernel wants AVX512-BF16 without AMX, and a C compiler")


class FeedForward(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.act(self.gate(x)) * self.up(x))
        return y


class Sigmoid(nn.Module):
    """SiLU by its formula, which rounds otherwise than torch's."""

    def forward(self, g: Tensor) -> Tensor:
        return g * torch.sigmoid(g)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(HALF)


def by_torch(g: Tensor, u: Tensor, dp: Tensor) -> list[Tensor]:
    """p, dg and du."""
    g, u = g.detach().requires_grad_(), u.detach().requires_grad_()
    p = F.silu(g) * u
    return [p.detach(), *torch.autograd.grad(p, (g, u), dp)]


def by_kernel(g: Tensor, u: Tensor, dp: Tensor) -> list[Tensor]:
    return [native_rows.gate(g, u), *native_rows.gate_backward(dp, g, u)]


@pytest.mark.parametrize("shape", [(1, 16), (7, 33), (2, 3, 1), (300, 100), (33, 1536)], ids=str)
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_torchs_numbers(shape: tuple[int, ...], scale: float) -> None:
    inputs = random(*shape, scale=scale), random(*shape, seed=1), random(*shape, seed=2)
    true = by_torch(*(t.double() for t in inputs))
    for mine, theirs, exact in zip(by_kernel(*inputs), by_torch(*inputs), true, strict=True):
        assert (mine != theirs).float().mean() < 1e-3
        own, other = ((t.double() - exact).norm() for t in (mine, theirs))
        assert own <= 1.01 * other
        assert own <= 0.01 * exact.norm()


def test_numbers_at_the_ends() -> None:
    g = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 88.0, -87.0, 200.0, -200.0, 3e38, -3e38, torch.inf, torch.nan]).to(HALF)
    u, dp = torch.full_like(g, 1.5), torch.full_like(g, 0.5)
    for mine, theirs in zip(by_kernel(g, u, dp), by_torch(g, u, dp), strict=True):
        assert torch.allclose(mine, theirs, rtol=0.01, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("lay", [lambda t: t.transpose(0, 1), lambda t: t[:, ::2], lambda t: t[..., 5:38],
                                 lambda t: t[:, :1].expand(-1, 6, -1)])
def test_inputs_that_lie_apart(lay: Callable[[Tensor], Tensor]) -> None:
    inputs = [lay(random(4, 9, 48, seed=i)) for i in range(3)]
    for apart, together in zip(by_kernel(*inputs), by_kernel(*(t.contiguous() for t in inputs)), strict=True):
        assert torch.equal(apart, together)


def test_a_token_has_the_same_bits_alone_and_by_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, every = [random(90, 576, seed=i) for i in range(3)], []
    for threads in (1, 2, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        every.append(by_kernel(*inputs))
    alone = by_kernel(*(t[40:41] for t in inputs))
    inputs[0][3] = torch.nan
    spoiled = by_kernel(*inputs)
    for first, second, third, one, nan in zip(*every, alone, spoiled, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, third)
        assert torch.equal(first[40:41], one)
        assert nan[3].isnan().all()
        assert torch.equal(first[4:], nan[4:])


def gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), (x, *module.parameters()))]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernel's calls."""
    calls: list[str] = []
    for name in ("gate", "gate_backward"):
        own: Any = getattr(native_rows, name)
        monkeypatch.setattr(native_rows, name, lambda *args, own=own, name=name: [calls.append(name), own(*args)][1])
    return calls


@pytest.mark.parametrize(("act", "is_silu"), [(nn.SiLU(), True), (nn.GELU(), False), (Sigmoid(), False)],
                         ids=["silu", "gelu", "sigmoid"])
def test_in_a_feed_forward(act: nn.Module, is_silu: bool, asked: list[str]) -> None:
    torch.manual_seed(0)
    module, x = FeedForward(act).to(HALF), random(7, 32)
    expected = gradients(module, x)
    with product_made_again(gated_modules(module, lambda: module(x))):
        found = gradients(module, x)
        assert asked == (["gate", "gate", "gate_backward"] if is_silu else [])  # once more for what down keeps
        again = gradients(computed_again_of(module), x)
    for mine, computed_again, theirs in zip(found, again, expected, strict=True):
        assert torch.allclose(mine, theirs, rtol=0.02, atol=1e-3)
        assert torch.equal(mine, computed_again)


def computed_again_of(module: nn.Module) -> Any:
    """The module, computed again in the backward pass."""
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = checkpoint(self.inner, x, use_reentrant=False)
            return y

    return Again()


def test_an_activation_that_is_watched_is_called(asked: list[str]) -> None:
    module, x, seen = FeedForward(nn.SiLU()).to(HALF), random(7, 32), []
    with product_made_again(gated_modules(module, lambda: module(x))):
        handle = module.act.register_forward_hook(lambda *_: seen.append(1))
        gradients(module, x)
        handle.remove()
    assert seen
    assert asked == []


def test_other_dtypes_and_machines_without_it(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = FeedForward(nn.SiLU()), random(7, 32)
    with product_made_again(gated_modules(module, lambda: module(x.float()))):
        gradients(module, x.float())
    module.to(HALF)
    monkeypatch.setattr(native_rows, "is_there", lambda: False)
    with product_made_again(gated_modules(module, lambda: module(x))):
        gradients(module, x)
    assert asked == []
