"""Adapters in banks at layers of one input: as `batched` computes them, and asked anew when something moved."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from deltaw.core import banked, native_low_rank
from deltaw.core.bank import Bank
from deltaw.core.banked import Entries, Entry, banked_linear
from deltaw.core.batched import Factors, Frozen, Group, grouped_linear

pytestmark = pytest.mark.skipif(not native_low_rank.is_there(),
                                reason="the kernel wants AVX512-BF16 without AMX, and a C compiler")
INPUTS, OUTPUTS, TOKENS = 64, (96, 32), 40
NAMES = ("a", "b", "c")
SPANS = [(0, 9), (9, 20), (25, 40)]


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slots() -> list[dict[str, SimpleNamespace]]:
    """Of two layers; `b` has nothing at the second, and lies in a bank of its own."""
    def pair(name: str, layer: int) -> tuple[nn.Parameter, nn.Parameter]:
        seed = 10 * NAMES.index(name) + layer
        return (nn.Parameter(0.1 * randn(4, INPUTS, seed=seed)),
                nn.Parameter(0.1 * randn(OUTPUTS[layer], 4, seed=seed + 5)))

    places = dict(zip("ac", Bank([[pair(name, 0), pair(name, 1)] for name in "ac"]).places, strict=True))
    places["b"] = Bank([[pair("b", 0)]]).places[0]
    return [{name: SimpleNamespace(place=own[layer], scaling=2.0) for name, own in places.items() if layer < len(own)}
            for layer in range(2)]


def layers() -> list[Frozen]:
    return [Frozen(randn(out, INPUTS, seed=out).bfloat16(), randn(out, seed=out + 1).bfloat16(), out)
            for out in OUTPUTS]


def entries(own: list[dict[str, SimpleNamespace]], kept: Entries | None = None) -> list[Entry]:
    kept = Entries() if kept is None else kept
    found = [kept.of(name, own) for name in NAMES]
    return [entry for entry in found if entry is not None]


def gradients(own: list[dict[str, SimpleNamespace]]) -> list[Tensor]:
    return [t.grad.clone() for layer in own for name in sorted(layer) for t in layer[name].place.factors
            if t.grad is not None]


def by_batched(x: Tensor, own: list[dict[str, SimpleNamespace]]) -> tuple[Tensor, ...]:
    return grouped_linear(x, layers(), [Group(*span, [None if name not in layer else Factors(
        *layer[name].place.factors, layer[name].scaling, layer[name].place) for layer in own])
        for name, span in zip(NAMES, SPANS, strict=True)])


@pytest.mark.parametrize("used", ["all", "first output"])
def test_every_bit_is_that_of_segments_one_by_one(used: str) -> None:
    x = randn(TOKENS, INPUTS, seed=0).bfloat16().requires_grad_()
    found = []
    for run in (lambda own: banked_linear(x, layers(), SPANS, entries(own)), lambda own: by_batched(x, own)):
        own, x.grad = slots(), None
        for times in (1, 2):  # the second is added
            y = run(own)
            sum(t.float().square().sum() for t in (y if used == "all" else y[:1])).backward()
            found.append([*y, x.grad.clone(), *gradients(own)])  # type: ignore[attr-defined]
            assert times == 1 or len(gradients(own)) == (10 if used == "all" else 6)
    assert all(torch.equal(a, b) for mine, other in zip(found[:2], found[2:], strict=True)
               for a, b in zip(mine, other, strict=True))


def test_an_adapter_with_two_spans_gets_both_gradients() -> None:
    x, own = randn(TOKENS, INPUTS, seed=0).bfloat16(), slots()
    twice = [entries(own)[0]] * 2
    for spans, many in (([(0, 9), (20, 30)], twice), ([(0, 9)], twice[:1]), ([(20, 30)], twice[:1])):
        y = banked_linear(x, layers(), spans, many)
        assert y is not None
        sum(t[a:b].float().square().sum() for t in y for a, b in spans).backward()  # type: ignore[union-attr]
    found = own[0]["a"].place.factors[0].grad
    apart = slots()
    for spans in ([(0, 9)], [(20, 30)]):
        y = banked_linear(x, layers(), spans, [entries(apart)[0]])
        assert y is not None
        sum(t[a:b].float().square().sum() for t in y for a, b in spans).backward()  # type: ignore[union-attr]
    assert torch.allclose(found, 2 * apart[0]["a"].place.factors[0].grad, rtol=1e-6, atol=1e-6)


def test_an_entry_is_kept_until_something_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    own, kept, asked = slots(), Entries(), []
    monkeypatch.setattr(banked, "_entry", lambda slots, make=banked._entry: asked.append(slots) or make(slots))
    first = entries(own, kept)
    assert [id(e) for e in entries(own, kept)] == [id(e) for e in first]
    assert len(asked) == 3
    own[0]["a"].scaling = 3.0
    assert entries(own, kept)[0].parts[0].scale == 3.0
    A = own[0]["a"].place.factors[0]
    A.data = A.data.clone()
    assert entries(own, kept)[0].packed != first[0].packed
    assert len(asked) == 5
    assert len(entries(own[:1], kept)[0].parts) == 1  # fewer layers follow
    own[0]["a"].place = None
    assert kept.of("a", own) is None


def test_a_copy_starts_without_entries() -> None:
    kept = Entries()
    entries(slots(), kept)
    assert not copy.deepcopy(kept)._kept
    assert not pickle.loads(pickle.dumps(kept))._kept


def test_other_formats_are_for_batched() -> None:
    own = slots()
    for factor in own[1]["c"].place.factors:
        factor.data = factor.data.half()
    assert Entries().of("c", own) is None
    assert banked_linear(randn(TOKENS, INPUTS, seed=0), layers(), SPANS, entries(slots())) is None
