"""Rotary positions by the kernel, beside float64 and transformers' own function, which stands there again after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deltaw.bases import native_rows
from deltaw.bases.rotary import rotary_in_one_pass

HALF = torch.bfloat16
pytestmark = pytest.mark.skipif(not native_rows.fit(torch.empty(1, dtype=HALF)),
                                reason="the kernel wants AVX512-BF16 without AMX, and a C compiler")


def rotate_half(x: Tensor) -> Tensor:
    first, second = x[..., :x.shape[-1] // 2], x[..., x.shape[-1] // 2:]
    return torch.cat([-second, first], -1)


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor,
                         unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


class Attention(nn.Module):
    """As transformers writes it: the function is one of its module's globals."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=HALF))

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return apply_rotary_pos_emb(*args, **kwargs)


def made(batch: int, heads: int, tokens: int, width: int, rows: int, seed: int = 0) -> list[Tensor]:
    """q, k, tokens first in memory, with cos and sin of any values, and gradients of both results."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, tokens, heads, width), (batch, tokens, 1, width)]
    heads_first = [torch.randn(shape, generator=generator).to(HALF).transpose(1, 2) for shape in shapes * 2]
    angles = [torch.randn(rows, tokens, width, generator=generator).to(HALF) for _ in range(2)]
    return [*heads_first[:2], *angles, *heads_first[2:]]


def results(rotary: Callable[..., Any], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *g: Tensor) -> list[Tensor]:
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    both = rotary(q, k, cos, sin)
    return [*(t.detach() for t in both), *torch.autograd.grad(both, (q, k), g)]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The kernel's calls: whether each was for a gradient."""
    calls: list[bool] = []
    own = native_rows.rotated

    def rotated(*args: Tensor, back: bool = False) -> Tensor:
        calls.append(back)
        return own(*args, back=back)

    monkeypatch.setattr(native_rows, "rotated", rotated)
    return calls


@pytest.mark.parametrize(("batch", "heads", "tokens", "width", "rows"), [
    (1, 1, 1, 2, 1), (2, 3, 7, 64, 1), (3, 9, 33, 64, 3), (2, 4, 50, 40, 2), (1, 2, 5, 256, 1)])
def test_as_near_to_float64_as_torch(batch: int, heads: int, tokens: int, width: int, rows: int,
                                     asked: list[bool]) -> None:
    inputs, attention, another = made(batch, heads, tokens, width, rows), Attention(), Attention()
    theirs, true = results(attention, *inputs), results(attention, *(t.double() for t in inputs))
    with rotary_in_one_pass(attention):
        mine = results(attention, *inputs)
        results(another, *inputs)
    assert asked == [False, False, True, True]
    assert "forward" not in attention.__dict__
    for a, b, exact in zip(mine, theirs, true, strict=True):
        assert a.stride() == inputs[0 if a.shape == inputs[0].shape else 1].stride() or 1 in a.shape
        assert (a.double() - exact).norm() <= 1.01 * (b.double() - exact).norm()


def test_inputs_that_lie_apart() -> None:
    inputs, attention = made(2, 4, 9, 32, 2), Attention()
    with rotary_in_one_pass(attention):
        one = results(attention, *inputs)
        for lay in (Tensor.contiguous, lambda t: t.mT.contiguous().mT, lambda t: t.repeat_interleave(2, 1)[:, ::2]):
            assert all(torch.equal(a, b) for a, b in zip(one, results(attention, *map(lay, inputs)), strict=True))


def test_the_same_bits_alone_and_by_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, attention, every = made(2, 4, 60, 64, 2), Attention(), []
    with rotary_in_one_pass(attention):
        for threads in (1, 2, 7):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            every.append(results(attention, *inputs))
        alone = results(attention, *(t[:, 40:41] if t.dim() == 3 else t[:, :, 40:41] for t in inputs))
        inputs[0][0, :, 3] = torch.nan
        spoiled = results(attention, *inputs)
    for first, second, third, one in zip(*every, alone, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, third)
        assert torch.equal(first[:, :, 40:41], one)
    assert spoiled[0][0, :, 3].isnan().all()
    assert torch.equal(spoiled[0][1], every[0][0][1])
    assert torch.equal(spoiled[0][0, :, 4:], every[0][0][0, :, 4:])


def test_what_the_kernel_is_not_for(asked: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, cos, sin, *_ = made(2, 4, 9, 32, 2)
    attention = Attention()
    with rotary_in_one_pass(attention):
        with torch.no_grad():
            attention(q, k, cos, sin)
        attention(q.mT, k.mT, cos.mT, sin.mT, unsqueeze_dim=1)
        attention(q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2)
        attention(q.float(), k.float(), cos.float(), sin.float())
        attention(q[..., :31], k[..., :31], cos[..., :1], sin[..., :1])
    monkeypatch.setattr(native_rows, "is_there", lambda: False)
    with rotary_in_one_pass(attention):
        assert "forward" not in attention.__dict__
        attention(q, k, cos, sin)
    assert asked == []


def interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def turned(x: Tensor) -> Tensor:
        return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)

    return q * cos[:, None] + turned(q) * sin[:, None], k * cos[:, None] + turned(k) * sin[:, None]


@pytest.mark.parametrize("other", [interleaved, lambda q, k, cos: (q, k), lambda *_: None])
def test_another_function_is_left_alone(other: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "apply_rotary_pos_emb", other)
    attention = Attention()
    with rotary_in_one_pass(attention):
        assert "forward" not in attention.__dict__


def test_computed_again() -> None:
    inputs, attention = made(2, 4, 9, 32, 2), Attention()
    with rotary_in_one_pass(attention):
        once = results(attention, *inputs)
        again = results(lambda *args: checkpoint(attention, *args, use_reentrant=False), *inputs)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiler_sees_the_plain_formula(asked: list[bool]) -> None:
    inputs, attention = made(2, 4, 9, 32, 2), Attention()
    expected = results(attention, *inputs)
    with rotary_in_one_pass(attention):
        torch.compiler.reset()
        found = results(torch.compile(attention, backend="eager", fullgraph=True), *inputs)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert asked == []


def test_a_model_of_transformers(tiny_llama: Callable[..., Any], asked: list[bool]) -> None:
    model = tiny_llama().to(HALF)
    ids = torch.randint(3, 60, (2, 9))
    expected = model(input_ids=ids).logits
    with rotary_in_one_pass(model):
        assert torch.allclose(model(input_ids=ids).logits, expected, atol=0.02)
    assert len(asked) == 2 * len(model.model.layers)
    with pytest.raises(IndexError), rotary_in_one_pass(model):
        model(input_ids=torch.tensor([[10**9]]))
    assert torch.equal(model(input_ids=ids).logits, expected)
