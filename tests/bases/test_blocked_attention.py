"""Attention in blocks of queries against float64, over rows of their own and packed ones, in every layout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from deltaw.bases import blocked_attention
from deltaw.bases.packed_attention import attend
from deltaw.bases.packed_rows import Evenly, Padded, together
from tests.bases.causal import check_that_nan_stays_with_its_example, made

NEAR = 0.006
"""Of bfloat16: the error of torch's own kernel in its worst gradient is 0.005."""


@pytest.fixture(autouse=True)
def _in_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever this processor is quickest with."""
    monkeypatch.setattr(blocked_attention, "is_quicker", lambda query: query.device.type == "cpu")
    yield
    blocked_attention.release()


def both(inputs: list[torch.Tensor], out: torch.Tensor, sees: torch.Tensor, scale: float) -> Iterator[float]:
    """Relative errors of the output and of each gradient, of random g."""
    shared = inputs[0].shape[1] // inputs[1].shape[1]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    k, v = (t.repeat_interleave(shared, 1) for t in wide[1:])
    true = ((wide[0] @ k.transpose(2, 3) * scale).masked_fill(~sees, -torch.inf).softmax(-1) @ v).transpose(1, 2)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    for mine, exact in zip((out, *torch.autograd.grad(out, inputs, g)),
                           (true, *torch.autograd.grad(true, wide, g.double())), strict=True):
        yield float((mine.detach().double() - exact.detach()).norm() / exact.detach().norm())


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 2e-6), (torch.bfloat16, NEAR)], ids=str)
@pytest.mark.parametrize(("batch", "tokens", "heads", "kv", "width"), [
    (2, 64, 4, 4, 8), (3, 150, 6, 2, 16), (1, 1, 2, 1, 8), (1, 65, 3, 1, 7)])
@pytest.mark.parametrize("tile", [1 << 20, 1 << 12])
def test_rows_without_padding(batch: int, tokens: int, heads: int, kv: int, width: int, dtype: torch.dtype,
                              near: float, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked_attention, "TILE", tile)  # the smaller takes a head of keys at a time
    inputs = made(batch, tokens, heads, kv, width, dtype)
    out, _ = attend(torch.nn.Module(), *inputs, None, scaling=0.3)
    assert out.dtype == dtype
    assert out.is_contiguous()
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    assert max(both(inputs, out, causal, 0.3)) < near


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 2e-6), (torch.bfloat16, NEAR)], ids=str)
@pytest.mark.parametrize("lengths", [[5] * 4, [70, 9, 66, 69], [3, 1, 200, 2], [100, 130, 100, 131, 20]], ids=str)
def test_packed_rows(lengths: list[int], dtype: torch.dtype, near: float) -> None:
    inputs = made(1, sum(lengths), 6, 2, 16, dtype)
    places = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    out, _ = attend(torch.nn.Module(), *inputs, None, cu_seq_lens_q=places)
    of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    sees = (of[:, None] == of[None]).tril()
    assert max(both(inputs, out, sees, 0.25)) < near


def test_long_examples_go_to_the_kernel_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked_attention, "LONGEST", 16)
    lengths = [17, 4, 16, 30]
    inputs = made(1, sum(lengths), 2, 2, 8, torch.float32)
    places = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    with torch.profiler.profile() as profile:
        out, _ = attend(torch.nn.Module(), *inputs, None, cu_seq_lens_q=places)
    assert [event.name for event in profile.events()].count("aten::_scaled_dot_product_flash_attention_for_cpu") == 2
    of = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    assert max(both(inputs, out, (of[:, None] == of[None]).tril(), 8**-0.5)) < 2e-6


def test_a_neighbour_that_is_not_a_number_changes_nothing() -> None:
    check_that_nan_stays_with_its_example(8)


@pytest.mark.parametrize("others", [
    {"attention_mask": torch.ones(1, 1, 4, 4, dtype=torch.bool)}, {"dropout": 0.5}, {"is_causal": False},
    {"position_bias": torch.zeros(1, 2, 4, 4)}], ids=str)
def test_what_is_not_plainly_causal_stays_with_transformers(others: dict[str, Any],
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("in blocks")

    monkeypatch.setattr(blocked_attention, "forward", refuse)
    q, k, v = made(1, 4, 2, 2, 8, torch.float32)
    torch.manual_seed(0)
    mask = others.pop("attention_mask", None)
    out, _ = attend(torch.nn.Module(), q, k, v, mask, **others)
    torch.manual_seed(0)
    bias = others.get("position_bias")
    causal = mask is None and others.get("is_causal", True)
    expected = F.scaled_dot_product_attention(
        q, k, v, is_causal=causal and bias is None, dropout_p=others.get("dropout", 0.0),
        attn_mask=mask if bias is None else torch.full((4, 4), -1e30).triu(1)[None, None])
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_the_operation_is_sound_for_the_compiler() -> None:
    for places in (None, torch.tensor([0, 66, 150], dtype=torch.int32)):
        inputs = made(1, 150, 4, 2, 8, torch.bfloat16)
        torch.library.opcheck(torch.ops.deltaw.packed_attention, (*inputs, places, 0.5))


def test_which_examples_share_a_call() -> None:
    found = together(torch.tensor([0, 300, 350, 400, 455, 460]), 2048)
    alone, some = found
    assert isinstance(alone, Evenly)
    assert (alone.part, alone.length) == (slice(0, 300), 300)
    assert isinstance(some, Padded)
    assert (some.length, len(some.at), len(some.real)) == (55, 4 * 55, 160)
    assert [type(one) for one in together(torch.tensor([0, 9, 18, 27]), 2048)] == [Evenly]
