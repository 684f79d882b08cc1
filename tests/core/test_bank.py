"""Factors in a bank: the same numbers as anywhere else, with gradients where the bank keeps them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from deltaw.core import stacks
from deltaw.core.bank import Bank
from deltaw.core.batched import Factors, Frozen, Group, grouped_linear, reference
from tests.device import DEVICE, randn

INPUTS, OUTPUTS = 6, (5, 7)
SCALES = (0.5, 2.0, 1.5)


def pairs(rank: int, dtype: torch.dtype, outputs: Sequence[int] = OUTPUTS) -> list[tuple[nn.Parameter, nn.Parameter]]:
    return [(nn.Parameter(randn(rank, INPUTS, dtype=dtype)), nn.Parameter(randn(o, rank, dtype=dtype)))
            for o in outputs]


def segments(adapters: Sequence[Sequence[tuple[Tensor, Tensor]]], places: Sequence[Sequence[object]],
             lengths: Sequence[int]) -> list[Group]:
    found, start = [], 0
    for factors, at, length, scale in zip(adapters, places, lengths, SCALES, strict=True):
        found.append(Group(start, start + length, [
            None if pair is None else Factors(*pair, scale, place)  # type: ignore[arg-type]
            for pair, place in zip(factors, at, strict=True)]))
        start += length
    return found


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many segments each product over neighbouring rows had."""
    counts: list[int] = []
    plain = stacks.BankStacks.__init__

    def noting(self: stacks.BankStacks, places: Sequence[object], *args: object) -> None:
        counts.append(len(places))
        plain(self, places, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(stacks.BankStacks, "__init__", noting)
    return counts


@pytest.mark.parametrize(("lengths", "together"), [((4, 4, 4), [3]), ((2, 4, 4), [2]), ((3, 4, 5), [])])
@pytest.mark.parametrize("left_out", [False, True])
def test_outputs_and_gradients_are_those_of_plain_operations(lengths: tuple[int, ...], together: list[int],
                                                             left_out: bool, used: list[int]) -> None:
    adapters = [pairs(2, torch.float64) for _ in lengths]
    copies = [[tuple(p.detach().clone().requires_grad_() for p in pair) for pair in own] for own in adapters]
    bank = Bank(adapters)
    placed = [[pair if i or not left_out else None for i, pair in enumerate(own)] for own in adapters]
    apart = [[pair if i or not left_out else None for i, pair in enumerate(own)] for own in copies]
    x = randn(1, sum(lengths), INPUTS, dtype=torch.float64, requires_grad=True)
    frozen = [Frozen(randn(o, INPUTS, dtype=torch.float64), None, o) for o in OUTPUTS]
    weights = [randn(1, sum(lengths), o, dtype=torch.float64) for o in OUTPUTS]
    for turn in (1, 2):  # the second adds to the first
        x.grad = None
        y = grouped_linear(x, frozen, segments(placed, bank.places, lengths))
        sum((w * t).sum() for w, t in zip(weights, y, strict=True)).backward()
        mine, x.grad = x.grad, None
        expected = reference(x, frozen, segments(apart, [[None] * 2] * 3, lengths))
        sum((w * t).sum() for w, t in zip(weights, expected, strict=True)).backward()
        assert used == together * turn
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(mine, x.grad, rtol=1e-12, atol=1e-12)
    for own, other, at in zip(adapters, copies, bank.places, strict=True):
        for i, (pair, copy, place) in enumerate(zip(own, other, at, strict=True)):
            for factor, its, kept in zip(pair, copy, place.gradients, strict=True):
                if left_out and not i:
                    assert factor.grad is None
                else:
                    assert factor.grad is kept
                    torch.testing.assert_close(factor.grad, its.grad, rtol=1e-12, atol=1e-12)


def test_in_bfloat16_over_float32_factors_as_stacks_that_are_copied() -> None:
    adapters = [pairs(3, torch.float32) for _ in SCALES]
    copies = [[tuple(p.detach().clone().requires_grad_() for p in pair) for pair in own] for own in adapters]
    x = randn(1, 12, INPUTS).to(torch.bfloat16)
    frozen = [Frozen(randn(o, INPUTS).to(torch.bfloat16), None, o) for o in OUTPUTS]
    results = []
    for own, places in ((adapters, Bank(adapters).places), (copies, [[None] * 2] * 3)):
        y = grouped_linear(x, frozen, segments(own, places, (4, 4, 4)))
        sum(t.float().square().sum() for t in y).backward()
        results.append([*y, *(p.grad for pairs_ in own for pair in pairs_ for p in pair)])
    for mine, its in zip(*results, strict=True):
        assert mine.dtype == its.dtype
        assert torch.equal(mine, its)


def test_beside_factors_that_lie_elsewhere_all_gradients_are_autograds(used: list[int]) -> None:
    adapters = [pairs(2, torch.float64) for _ in SCALES]
    places = [*Bank(adapters[:2]).places, [None] * 2]
    x = randn(1, 9, INPUTS, dtype=torch.float64)
    frozen = [Frozen(randn(o, INPUTS, dtype=torch.float64), None, o) for o in OUTPUTS]
    sum(t.square().sum() for t in grouped_linear(x, frozen, segments(adapters, places, (3, 3, 3)))).backward()
    assert not used
    every = [p for own in adapters for pair in own for p in pair]
    found = [p.grad for p in every]
    for p in every:
        p.grad = None
    sum(t.square().sum() for t in reference(x, frozen, segments(adapters, [[None] * 2] * 3, (3, 3, 3)))).backward()
    for grad, p in zip(found, every, strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=1e-12, atol=1e-12)


def test_projections_of_unlike_ranks_are_not_taken_as_one(used: list[int]) -> None:
    adapters = [[pairs(2, torch.float64, (5,))[0], pairs(3, torch.float64, (7,))[0]] for _ in SCALES]
    bank = Bank(adapters)
    x = randn(1, 9, INPUTS, dtype=torch.float64)
    frozen = [Frozen(randn(o, INPUTS, dtype=torch.float64), None, o) for o in OUTPUTS]
    y = grouped_linear(x, frozen, segments(adapters, bank.places, (3, 3, 3)))
    sum(t.sum() for t in y).backward()
    assert not used
    expected = reference(x, frozen, segments(adapters, bank.places, (3, 3, 3)))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert all(p.grad is not None for own in adapters for pair in own for p in pair)


def test_a_nan_stays_in_its_row(used: list[int]) -> None:
    adapters = [pairs(2, torch.float32) for _ in SCALES]
    bank = Bank(adapters)
    with torch.no_grad():
        adapters[1][0][0].fill_(float("nan"))
    x = randn(1, 9, INPUTS, requires_grad=True)
    y = grouped_linear(x, [Frozen(randn(o, INPUTS), None, o) for o in OUTPUTS],
                       segments(adapters, bank.places, (3, 3, 3)))
    sum(t.sum() for t in y).backward()
    assert used == [3]
    assert x.grad is not None
    assert [bool(x.grad[0, 3 * n:3 * n + 3].isfinite().all()) for n in range(3)] == [True, False, True]
    assert [bool(row.isfinite().all()) for row in bank.gradients] == [True, False, True]


def test_parameters_keep_their_values_and_get_memory_of_their_own_again() -> None:
    own = pairs(2, torch.float32)
    before = [p.detach().clone() for pair in own for p in pair]
    bank = Bank([own, pairs(2, torch.float32)])
    assert bank.values.shape == (2, sum(t.numel() for t in before))
    for place in bank.places[0]:
        place.leave()
    bank.values.zero_()
    assert all(torch.equal(p, t) for p, t in zip((p for pair in own for p in pair), before, strict=True))
    assert own[0][0].device.type == torch.device(DEVICE).type
