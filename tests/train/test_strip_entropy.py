"""The loss over an output layer in 8 bits against the logits of the dense table in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltaw
from deltaw import LoraConfig
from deltaw.core import native_low_rank, stretches
from deltaw.core import packed as packing
from deltaw.core.tables import PackedHead, pack_table
from deltaw.train.cross_entropy import OutputLayer, token_loss, token_losses
from deltaw.train.terms import Terms
from tests.device import DEVICE, cpu_only, randint, randn
from tests.laws.dense import fill

V, I, N = 50, 8, 23  # noqa: E741
TERMS = [Terms(), Terms(smoothing=0.1), Terms(z_loss=0.01), Terms(smoothing=0.2, z_loss=0.03)]
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-6, torch.bfloat16: 2e-2}
"""Of the loss, relative; five times it of a gradient, relative to its largest number. A table's numbers are codes times
float32 scales, so float64 hidden states do not make it more exact."""


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four strips of 13 words, the last of 11; stretches of eight tokens, the last of seven."""
    for name in ("STRIP", "GPU_STRIP"):
        monkeypatch.setattr(stretches, name, 16 * I)
    monkeypatch.setattr(stretches, "STRETCH_VALUES", 8 * 13)


def layer(dtype: torch.dtype, *, bias: bool = False, size: float = 1.0) -> tuple[Any, Tensor]:
    """An output layer, and its table as dense float64."""
    torch.manual_seed(0)
    weight = pack_table(size * torch.randn(V, I), (V, I), torch.device(DEVICE))
    head = PackedHead(nn.Linear(I, V, bias=bias).to(DEVICE, dtype).requires_grad_(False), weight, dtype)
    return head, weight.data.double() * (weight.absmax.double() / 127).unsqueeze(1)


def dense(z_NV: Tensor, targets: Tensor, terms: Terms) -> Tensor:
    """The definition, (N,)."""
    lse = torch.logsumexp(z_NV.double(), 1)
    z_t = z_NV.double().gather(1, targets.unsqueeze(1)).squeeze(1)
    return ((1 - terms.smoothing) * (lse - z_t) + terms.smoothing * (lse - z_NV.double().mean(1))
            + terms.z_loss * lse**2)


def near(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).abs().max()) <= 5 * TOLERANCE[dtype] * float(wanted.abs().max())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_loss_and_gradient_are_those_of_the_dense_table(bias: bool, terms: Terms, dtype: torch.dtype) -> None:
    head, W = layer(dtype, bias=bias)
    h = (2 * randn(N, I)).to(dtype).requires_grad_()
    targets = randint(0, V, (N,))
    wide = h.detach().double().requires_grad_()
    each = dense(wide @ W.t() + (head.bias.double() if bias else 0), targets, terms)
    wanted, = torch.autograd.grad(0.5 * each.sum(), wide)
    loss = token_loss(h, targets, OutputLayer(head), terms)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert loss.item() == pytest.approx(each.sum().item(), rel=TOLERANCE[dtype])
    assert near(torch.autograd.grad(0.5 * loss, h)[0], wanted, dtype)
    with torch.no_grad():
        assert token_loss(h, targets, OutputLayer(head), terms).item() == pytest.approx(loss.item(), rel=1e-6)
    apart = token_losses(h, targets, OutputLayer(head), terms)
    assert near(apart, each, dtype)
    assert near(torch.autograd.grad(0.5 * apart.sum(), h)[0], wanted, dtype)


def test_one_token_and_none() -> None:
    head, W = layer(torch.float32)
    h = randn(1, I).requires_grad_()
    target = torch.tensor([V - 1], device=DEVICE)
    loss = token_loss(h, target, OutputLayer(head))
    assert loss.item() == pytest.approx(dense(h.double() @ W.t(), target, Terms()).item(), rel=1e-6)
    assert token_loss(h[:0], target[:0], OutputLayer(head)).item() == 0
    assert token_losses(h[:0], target[:0], OutputLayer(head)).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_logits_and_tokens_that_are_known_already(dtype: torch.dtype) -> None:
    head, W = layer(dtype, size=40.0)
    targets = randint(0, V, (N,))
    h = (W[targets].float() * 0.02 + 0.1 * randn(N, I)).to(dtype).requires_grad_()
    wide = h.detach().double().requires_grad_()
    each = dense(wide @ W.t(), targets, Terms())
    assert float(each.detach().min()) < 1e-6  # some are known, and their logits lie in the hundreds
    wanted, = torch.autograd.grad(each.sum(), wide)
    loss = token_loss(h, targets, OutputLayer(head))
    assert loss.item() == pytest.approx(each.sum().item(), rel=5 * TOLERANCE[dtype])
    got, = torch.autograd.grad(loss, h)
    assert got.isfinite().all()
    assert float((got.double() - wanted).norm() / wanted.norm()) < 5 * TOLERANCE[dtype] + 1e-4


def test_each_stretch_of_tokens_unpacks_the_layer_once(monkeypatch: pytest.MonkeyPatch) -> None:
    head, _ = layer(torch.float32)
    seen: list[int] = []
    strips = packing.Packed.strips

    def counted(self: packing.Packed, *args: Any) -> Any:
        for rows, strip in strips(self, *args):
            seen.append(len(strip))
            yield rows, strip

    monkeypatch.setattr(packing.Packed, "strips", counted)
    h = randn(N, I).requires_grad_()
    token_loss(h, randint(0, V, (N,)), OutputLayer(head)).backward()
    assert seen == 3 * [13, 13, 13, 11]


@cpu_only("kernels in C are a processor's")
@pytest.mark.skipif(not native_low_rank.is_there(), reason="the kernel wants AVX512-BF16 without AMX")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_codes_are_read_by_the_kernel_of_products(bias: bool, terms: Terms, monkeypatch: pytest.MonkeyPatch) -> None:
    words, width = 160, 64
    monkeypatch.setattr(stretches, "STRIP", 20 * width)
    monkeypatch.setattr(packing.Packed, "strips", None)  # nobody asks
    assert [s.stop - s.start for s in packing.places_of_strips(words, width)] == [20] * 8
    monkeypatch.setattr(stretches, "STRIP", 50 * width)
    assert [s.stop - s.start for s in packing.places_of_strips(words, width)] == [64, 64, 32]
    torch.manual_seed(0)
    weight = pack_table(torch.randn(words, width), (words, width), torch.device("cpu"))
    own = nn.Linear(width, words, bias=bias).bfloat16().requires_grad_(False)
    head = PackedHead(own, weight, torch.bfloat16)
    W = weight.data.double() * (weight.absmax.double() / 127).unsqueeze(1)
    h, targets = randn(N, width).bfloat16().requires_grad_(), randint(0, words, (N,))
    wide = h.detach().double().requires_grad_()
    each = dense(wide @ W.t() + (own.bias.double() if bias else 0), targets, terms)
    loss = token_loss(h, targets, OutputLayer(head), terms)
    assert loss.item() == pytest.approx(each.sum().item(), rel=TOLERANCE[torch.bfloat16])
    assert near(torch.autograd.grad(loss, h)[0], torch.autograd.grad(each.sum(), wide)[0], torch.bfloat16)


@pytest.mark.parametrize("kind", ["capped", "adapted", "adapted, off"])
def test_layers_that_do_something_else_too_go_the_plain_way(kind: str) -> None:
    head, W = layer(torch.float32)
    model = nn.ModuleDict({"head": head})
    finish, trained = (lambda z: z), []
    if kind == "capped":
        finish = lambda z: 1.5 * torch.tanh(z / 1.5)  # noqa: E731
        output = OutputLayer(head, finish)
    else:
        board = deltaw.attach(model, LoraConfig(r=2, lora_alpha=6, target_modules=["head"]), "a", seed=0)
        fill(board, "a", seed=3)
        if kind == "adapted":
            trained = list(board.parameters("a").values())
        else:
            board.use(None)
        output = OutputLayer(head)
    h = randn(N, I).requires_grad_()
    targets = randint(0, V, (N,))
    logits = h.double() @ W.t()
    if kind == "adapted":
        A, B = (p.double() for p in trained)
        logits = logits + 3 * (h.double() @ A.t() @ B.t())
    wanted = torch.autograd.grad(dense(finish(logits), targets, Terms()).sum(), [h, *trained])
    loss = token_loss(h, targets, output)
    assert loss.item() == pytest.approx(dense(finish(logits), targets, Terms()).sum().item(), rel=1e-5)
    for mine, true in zip(torch.autograd.grad(loss, [h, *trained]), wanted, strict=True):
        assert near(mine, true, torch.float32)
