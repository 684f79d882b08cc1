"""The stretched loss against the full logits in float64, for every output layer and every term."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltaw
from deltaw import LoraConfig
from deltaw.core import stretches
from deltaw.train.cross_entropy import OutputLayer, token_loss
from deltaw.train.terms import Terms
from tests.device import DEVICE, randint, randn
from tests.laws.dense import fill

V, I, N = 50, 8, 23  # noqa: E741


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stretches of seven tokens, so that there are four of them and the last is short."""
    monkeypatch.setattr(stretches, "STRETCH_VALUES", 7 * V)


def dense(z_NV: Tensor, targets: Tensor, terms: Terms) -> Tensor:
    """The definition, token by token."""
    total = torch.zeros((), dtype=torch.float64, device=z_NV.device)
    for z, t in zip(z_NV.double(), targets, strict=True):
        lse = torch.logsumexp(z, 0)
        total = total + (1 - terms.smoothing) * (lse - z[t]) + terms.smoothing * (lse - z.mean())
        total = total + terms.z_loss * lse**2
    return total


def layer(kind: str, dtype: torch.dtype) -> tuple[OutputLayer, list[Tensor]]:
    """An output layer and its trained tensors."""
    head = nn.Linear(I, V, bias=kind != "plain").to(DEVICE, dtype)
    if kind == "trained":
        return OutputLayer(head), list(head.parameters())
    head.requires_grad_(False)
    if kind == "capped":
        return OutputLayer(head, lambda z: 1.5 * torch.tanh(z / 1.5)), []
    if kind in ("adapted", "adapted, off"):
        model = nn.ModuleDict({"head": head})
        board = deltaw.attach(model, LoraConfig(r=2, target_modules=["head"]), "a", seed=0)
        fill(board, "a", seed=3)
        if kind == "adapted, off":
            board.use(None)
        return OutputLayer(head), [p for p in board.parameters("a").values() if kind == "adapted"]
    return OutputLayer(head), []


KINDS = ["plain", "bias", "trained", "capped", "adapted", "adapted, off"]
TERMS = [Terms(), Terms(smoothing=0.1), Terms(z_loss=0.01), Terms(smoothing=0.2, z_loss=0.03)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_it_is_the_loss_of_all_logits_with_its_gradient(kind: str, terms: Terms, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    output, trained = layer(kind, dtype)
    h = (2 * randn(N, I)).to(dtype).requires_grad_()
    targets = randint(0, V, (N,))
    loss = token_loss(h, targets, output, terms)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    got = torch.autograd.grad(loss * 0.5, [h, *trained])
    expected = dense(output.logits(h), targets, terms)
    wanted = torch.autograd.grad(expected * 0.5, [h, *trained])
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for mine, true in zip(got, wanted, strict=True):
        allowed = max(tolerance, 1e-6 if mine.dtype == torch.float32 else 0)  # an adapter's factors may be narrower
        assert float((mine - true).abs().max()) <= 5 * allowed * float(true.abs().max())
    with torch.no_grad():
        assert token_loss(h, targets, output, terms).item() == pytest.approx(expected.item(), rel=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_which_layers_have_the_gradient_written_out(kind: str) -> None:
    output, _ = layer(kind, torch.float32)
    assert output.is_plain == (kind in ("plain", "bias", "adapted, off"))
    assert output.is_linear == (output.is_plain or kind == "trained")


def test_logits_never_exist_together() -> None:
    output, _ = layer("plain", torch.float32)
    made: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            made.extend([out.numel()] if isinstance(out, Tensor) else [])
            return out

    h = randn(N, I, requires_grad=True)
    with Watch():
        token_loss(h, randint(0, V, (N,)), output).backward()
    assert max(made) <= max(7 * V, V * I, N * I) < N * V / 2


def test_an_unlikely_label_has_a_finite_loss() -> None:
    head = nn.Linear(I, V, bias=False).to(DEVICE).requires_grad_(False)
    h = torch.full((1, I), 1e4, device=DEVICE, requires_grad=True)
    z = head(h)[0]
    loss = token_loss(h, z.argmin().unsqueeze(0), OutputLayer(head))
    assert loss.item() == pytest.approx((z.max() - z.min()).item(), rel=1e-5)
    loss.backward()
    assert h.grad is not None
    assert bool(h.grad.isfinite().all())


def test_no_tokens_give_no_loss() -> None:
    output, _ = layer("plain", torch.float32)
    h = randn(0, I, requires_grad=True)
    loss = token_loss(h, torch.zeros(0, dtype=torch.long, device=DEVICE), output)
    loss.backward()
    assert loss.item() == 0
    assert h.grad is not None
    assert h.grad.shape == (0, I)
