"""The grouped low-rank linear against dense float64 algebra, segment by segment; and that segments keep apart."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import deltaw
from deltaw.core import batched
from deltaw.core.batched import Factors, Frozen, Group, grouped_linear, reference
from deltaw.errors import RoutingError, StateError
from tests.device import DEVICE, randn

RANKS = (1, 3, 8, 2)


def layers(inputs: int, outputs: Sequence[int], dtype: torch.dtype = torch.float64) -> list[Frozen]:
    return [Frozen(randn(o, inputs, dtype=dtype), randn(o, dtype=dtype) if i % 2 else None, o)
            for i, o in enumerate(outputs)]


def groups_of(lengths: Sequence[int], inputs: int, outputs: Sequence[int], *, gap: int = 0,
              dtype: torch.dtype = torch.float64) -> list[Group]:
    """Segments of these lengths; adapter n leaves out projection n (of more than one)."""
    found, start = [], 0
    for n, length in enumerate(lengths):
        rank = RANKS[n % len(RANKS)]
        factors = [None if len(outputs) > 1 and i == n % (len(outputs) + 1) else Factors(
            randn(rank, inputs, dtype=dtype, requires_grad=True),
            randn(o, rank, dtype=dtype, requires_grad=True), 0.5 + n) for i, o in enumerate(outputs)]
        found.append(Group(start, start + length, factors))
        start += length + gap
    return found


def tensors(groups: Sequence[Group]) -> list[Tensor]:
    return [t for g in groups for f in g.factors if f is not None for t in (f.A, f.B)]


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("outputs", [(5,), (5, 7, 3)])
@pytest.mark.parametrize(("lengths", "gap"), [((4, 4, 4, 4), 0), ((1, 6, 2, 9), 0), ((3, 3), 2), ((7,), 0)])
def test_outputs_and_gradients_are_dense_algebra(lengths: tuple[int, ...], gap: int, outputs: tuple[int, ...],
                                                 stacked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched, "STACKED_FROM", 2 if stacked else 99)
    monkeypatch.setattr(batched, "_MOST_PADDING", 99.0)
    total = sum(lengths) + gap * len(lengths)
    x = randn(1, total, 6, dtype=torch.float64, requires_grad=True)
    frozen, groups = layers(6, outputs), groups_of(lengths, 6, outputs, gap=gap)
    weights = [randn(1, total, o, dtype=torch.float64) for o in outputs]
    wanted = [x, *tensors(groups)]
    results = []
    for compute in (grouped_linear, reference):
        y = compute(x, frozen, groups)
        results.append((y, torch.autograd.grad(sum((w * t).sum() for w, t in zip(weights, y, strict=True)), wanted)))
    (ours, ours_g), (expected, expected_g) = results
    dense = [torch.stack([x[0, t] @ (layer.W + sum(
        (f.scale * f.B @ f.A for g in groups for f in [g.factors[i]] if f is not None and g.start <= t < g.stop),
        start=torch.zeros_like(layer.W))).t() + (layer.b if layer.b is not None else 0) for t in range(total)])
        for i, layer in enumerate(frozen) if layer.W is not None]
    for a, b, c in zip(ours, expected, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(a[0], c, rtol=1e-12, atol=1e-12)
    for a, b in zip(ours_g, expected_g, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_the_change_alone_for_a_host_that_is_no_plain_product() -> None:
    x = randn(9, 6, dtype=torch.float64, requires_grad=True)
    groups = groups_of((4, 5), 6, (5,))
    y = grouped_linear(x, [Frozen(None, None, 5)], groups)[0]
    expected = reference(x, [Frozen(None, None, 5)], groups)[0]
    torch.testing.assert_close(y, expected)
    for a, b in zip(torch.autograd.grad(y.square().sum(), [x, *tensors(groups)]),
                    torch.autograd.grad(expected.square().sum(), [x, *tensors(groups)]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("stacked", [False, True])
def test_nan_in_one_segment_stays_there(stacked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched, "STACKED_FROM", 2 if stacked else 99)
    monkeypatch.setattr(batched, "_MOST_PADDING", 99.0)
    x = randn(12, 6, dtype=torch.float64)
    x[4:8] = float("nan")
    x.requires_grad_()
    groups = groups_of((4, 4, 4), 6, (5,))
    y = grouped_linear(x, layers(6, (5,)), groups)[0]
    assert bool(y[4:8].isnan().all())
    assert bool(y[:4].isfinite().all())
    assert bool(y[8:].isfinite().all())
    dx, *found = torch.autograd.grad(y.sum(), [x, *tensors(groups)])
    assert [bool(g.isfinite().all()) for g in found] == [True, True, False, False, True, True]
    assert bool(dx[:4].isfinite().all())
    assert bool(dx[8:].isfinite().all())


def test_neighbours_of_like_rank_and_length_are_stacked_and_padding_ends_a_run() -> None:
    def runs(ranks: Sequence[int], lengths: Sequence[int], **more: float) -> list[tuple[int, int]]:
        groups, start = [], 0
        for rank, length in zip(ranks, lengths, strict=True):
            factors = Factors(torch.ones(rank, 6, device=DEVICE), torch.ones(5, rank, device=DEVICE), 1.0)
            groups.append(Group(start, start + length, [factors], **more))
            start += length
        return batched._Plan(groups, layers(6, (5,)), torch.empty(start, 6, device=DEVICE)).runs

    assert runs((2, 2, 3, 4), (4, 4, 4, 4)) == [(0, 4)]
    assert runs((1, 1, 16, 16), (4, 4, 4, 4)) == [(0, 2), (2, 4)]  # 16 for 1, 1 and 16 is 2.7 times their size
    assert runs((2, 2, 2, 2), (4, 4, 5, 4)) == [(0, 2), (2, 3), (3, 4)]
    assert runs((2, 2), (4, 4), dropout=0.1) == [(0, 1), (1, 2)]
    assert runs((2,), (4,)) == [(0, 1)]


def test_a_second_backward_pass_gives_the_same() -> None:
    x = randn(12, 6, dtype=torch.float64, requires_grad=True)
    groups = groups_of((4, 4, 4), 6, (5, 3))
    y = sum(t.square().sum() for t in grouped_linear(x, layers(6, (5, 3)), groups))
    first = torch.autograd.grad(y, [x, *tensors(groups)], retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(y, [x, *tensors(groups)]), strict=True):
        torch.testing.assert_close(a, b)


def test_dropout_is_each_segments_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn as a run alone draws it: the neighbours' lengths and draws do not matter."""
    def output(before: int) -> Tensor:
        generator = torch.Generator(DEVICE).manual_seed(3)
        other = torch.Generator(DEVICE).manual_seed(9)
        torch.manual_seed(1)
        own, beside = groups_of((5, 4), 6, (5,), dtype=torch.float32)
        x = randn(5, 6)
        rows = torch.cat([torch.ones(before, 6, device=DEVICE), x])
        groups = [Group(0, before, beside.factors, 0.5, other),
                  Group(before, before + 5, own.factors, 0.5, generator)]
        return grouped_linear(rows, [Frozen(None, None, 5)], groups)[0][before:]

    torch.testing.assert_close(output(4), output(11))
    torch.manual_seed(1)
    own, _ = groups_of((5, 4), 6, (5,), dtype=torch.float32)
    x = randn(5, 6)
    keep = torch.empty(5, 6, dtype=torch.bool, device=DEVICE)
    keep.bernoulli_(0.5, generator=torch.Generator(DEVICE).manual_seed(3))
    factors = own.factors[0]
    assert factors is not None
    torch.testing.assert_close(output(4), factors.scale * (x * keep / 0.5) @ factors.A.t() @ factors.B.t())


def test_dropout_gradients_by_differences() -> None:
    x = randn(6, 4, dtype=torch.float64, requires_grad=True)
    groups = groups_of((4, 2), 4, (3,))

    def compute(x: Tensor, *factors: Tensor) -> Tensor:
        made = [Group(g.start, g.stop, [Factors(factors[2 * n], factors[2 * n + 1], 0.5)], 0.4,
                      torch.Generator(DEVICE).manual_seed(n)) for n, g in enumerate(groups)]
        return grouped_linear(x, [Frozen(None, None, 3)], made)[0]

    assert torch.autograd.gradcheck(compute, (x, *tensors(groups)))


def test_adapters_without_tokens_get_no_gradient(tiny_llama: object) -> None:
    model = tiny_llama()  # type: ignore[operator]
    board = deltaw.attach(model, deltaw.LoraConfig(r=2), "a", seed=0)
    board.add("b", deltaw.LoraConfig(r=3), seed=1)
    board.add("c", deltaw.LoraConfig(r=4), seed=2)
    with board.route(["a", "b", "a"], lengths=[3, 4, 2]):
        model(input_ids=torch.arange(3, 12, device=DEVICE)[None]).logits.square().sum().backward()
    assert all(p.grad is None for p in board.parameters("c").values())
    assert all(p.grad is not None for name in "ab" for p in board.parameters(name).values())


def test_lengths_that_do_not_fit_are_refused(tiny_llama: object) -> None:
    model = tiny_llama()  # type: ignore[operator]
    board = deltaw.attach(model, deltaw.LoraConfig(r=2), "a", seed=0)
    board.add("b", deltaw.LoraConfig(r=3))
    with board.route(["a", "b"], lengths=[3, 4]), pytest.raises(RoutingError, match="8 tokens; expected 7"):
        model(input_ids=torch.arange(3, 11, device=DEVICE)[None])
    with pytest.raises(StateError, match="expected 2, tokens for each name"), \
            board.route(["a", "b"], lengths=[3]):
        pass


def test_an_embedding_changes_its_own_tokens(tiny_llama: object) -> None:
    model = tiny_llama()  # type: ignore[operator]
    config = deltaw.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False)
    board = deltaw.attach(model, config, "a", seed=0)
    board.add("b", config, seed=1)
    ids = torch.arange(3, 11, device=DEVICE)[None]
    embed = model.model.embed_tokens
    with torch.no_grad():
        expected = []
        for name, part in (("a", ids[:, :3]), ("b", ids[:, 3:])):
            board.use(name)
            expected.append(embed(part))
        with board.route(["a", "b"], lengths=[3, 5]):
            torch.testing.assert_close(embed(ids), torch.cat(expected, 1))
