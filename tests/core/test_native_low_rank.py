"""The compiled narrow products against float64 and against plain operations, alone, grouped and in banks."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import deltaw
from deltaw import LoraConfig
from deltaw.core import native_linear, native_low_rank, native_op
from deltaw.core.bank import Bank
from deltaw.core.batched import Factors, Frozen, Group, grouped_linear
from deltaw.core.frozen import Projection, reference
from deltaw.core.kernels import low_rank_linear
from deltaw.core.native_low_rank import Part, Segment

needs_kernel = pytest.mark.skipif(not native_low_rank.is_there(),
                                  reason="the kernel wants AVX512-BF16 without AMX, and a C compiler")
INPUTS, OUTPUTS = 96, (64, 192, 32)
BF16 = 0.004
"""Relative: a number of bfloat16 is off by 2^-9 at most, and what is here is rounded twice."""


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def part(which: int, rank: int, dtype: torch.dtype, scale: float = 2.0) -> Part:
    seed = 10 * rank + which
    return Part(which, (0.1 * randn(rank, INPUTS, seed=seed)).to(dtype).requires_grad_(),
                (0.1 * randn(OUTPUTS[which], rank, seed=seed + 1)).to(dtype).requires_grad_(), scale)


def mixed(dtype: torch.dtype) -> list[Segment]:
    """Ranks odd and even, some projections only, a single token, tokens of nobody, and many tokens."""
    return [Segment(0, 5, [part(0, 8, dtype), part(1, 8, dtype), part(2, 8, dtype)]),
            Segment(5, 70, [part(1, 3, dtype, 0.5)]), Segment(80, 81, [part(0, 1, dtype), part(2, 17, dtype, 3.0)]),
            Segment(81, 700, [part(0, 64, dtype, 0.1), part(2, 5, dtype)])]


def error(got: Tensor, right: Tensor) -> float:
    return float((got.detach().double() - right.detach().double()).norm() / right.detach().double().norm())


def groups(segments: Sequence[Segment]) -> list[Group]:
    return [Group(s.start, s.stop, [next((Factors(p.A, p.B, p.scale) for p in s.parts if p.which == i), None)
                                    for i in range(len(OUTPUTS))]) for s in segments]


def layers(dtype: torch.dtype = torch.bfloat16) -> list[Frozen]:
    return [Frozen(randn(out, INPUTS, seed=out).to(dtype), randn(out, seed=out + 1).to(dtype), out) for out in OUTPUTS]


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_segments_of_all_kinds(dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    segments = mixed(dtype)
    x = randn(700, INPUTS, seed=0).requires_grad_()
    assert native_low_rank.fits(x, OUTPUTS, segments)
    y = grouped_linear(x, layers(), groups(segments))
    g = [randn(700, out, seed=7 + out) for out in OUTPUTS]
    leaves = [x, *(t for s in segments for p in s.parts for t in (p.A, p.B))]
    found = torch.autograd.grad(y, leaves, g)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    own = iter(zip(wide[1::2], wide[2::2], strict=True))
    exact = [wide[0] @ layer.W.double().t() + layer.b.double() for layer in layers()]  # type: ignore[union-attr]
    for segment in segments:
        for p in segment.parts:
            A, B = next(own)
            change = p.scale * wide[0][segment.start:segment.stop] @ A.t() @ B.t()
            exact[p.which] = exact[p.which].index_add(0, torch.arange(segment.start, segment.stop), change)
    right = torch.autograd.grad(exact, wide, [t.double() for t in g])
    assert [t.dtype for t in found] == [t.dtype for t in leaves]
    assert max(error(a, b) for a, b in zip((*y, *found), (*exact, *right), strict=True)) < BF16


@needs_kernel
def test_alone_among_others_and_by_any_number_of_threads_each_bit_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    segments, x = mixed(torch.float32), randn(700, INPUTS, seed=0)
    for threads in (1, 2, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        together = results(x, segments)
        for segment, (y, of_factors, dx) in zip(segments, together, strict=True):
            rows = slice(segment.start, segment.stop)
            (y_alone, alone, dx_alone), = results(
                x[rows].contiguous(), [Segment(0, segment.stop - segment.start, segment.parts)], segment.start)
            assert all(torch.equal(a, b) for a, b in zip((*y, *of_factors, dx), (*y_alone, *alone, dx_alone),
                                                         strict=True))


def results(x: Tensor, segments: list[Segment], first: int = 0) -> list[tuple[list[Tensor], list[Tensor], Tensor]]:
    """Of each segment what the kernel makes: y, the gradients of its factors, dx."""
    y = [torch.empty(len(x), out, dtype=torch.bfloat16) for out in OUTPUTS]
    g = [randn(700, out, seed=7 + out)[first:first + len(x)] for out in OUTPUTS]
    W = [layer.W for layer in layers()]
    h = native_linear.outputs(x, y, W, [layer.b for layer in layers()], native_low_rank.packed(segments))
    dx, each = native_linear.gradients(x, h, g, W, segments)
    assert dx is not None
    found = iter(each)
    return [([t[s.start:s.stop] for t in y], [t for _ in s.parts for t in (next(found), next(found)) if t is not None],
             dx[s.start:s.stop]) for s in segments]


@needs_kernel
def test_an_output_that_nobody_used_gives_its_factors_no_gradient() -> None:
    segments, x = mixed(torch.float32)[:1], randn(9, INPUTS, seed=0).requires_grad_()
    y = grouped_linear(x, layers(), groups(segments))
    leaves = [t for p in segments[0].parts for t in (p.A, p.B)]
    found = torch.autograd.grad(y[1].sum(), leaves, allow_unused=True)
    assert [t is None for t in found] == [True, True, False, False, True, True]
    alone = torch.autograd.grad(grouped_linear(x, layers(), groups(segments))[1].sum(), leaves[2:4])
    assert all(torch.equal(a, b) for a, b in zip(found[2:4], alone, strict=True) if a is not None)


@needs_kernel
def test_not_a_number_stays_with_its_segment() -> None:
    segments, x = mixed(torch.float32), randn(700, INPUTS, seed=0)
    x[5:70] = torch.nan
    for segment, (y, of_factors, dx) in zip(segments, results(x, segments), strict=True):
        used = [y[p.which] for p in segment.parts]
        assert all(bool(t.isnan().any()) == (segment.start == 5) for t in (*used, *of_factors[::2]))
        assert all(bool(t.isfinite().all()) for t in (dx,))


@needs_kernel
def test_gradients_are_written_to_banks_and_added_up_there() -> None:
    shapes = [(0, 8), (1, 8)]
    owners = [[tuple(nn.Parameter(t.detach().clone()) for t in part(which, rank, torch.float32)[1:3])
               for which, rank in shapes] for _ in range(3)]
    bank = Bank(owners)  # type: ignore[arg-type]
    x = randn(30, INPUTS, seed=0)
    own = [Group(10 * n, 10 * n + 10, [*(Factors(*place.factors, 2.0, place) for place in bank.places[n]), None])
           for n in range(3)]
    plain = [Group(g.start, g.stop, [None if f is None else Factors(f.A.detach().clone().requires_grad_(),
             f.B.detach().clone().requires_grad_(), f.scale) for f in g.factors]) for g in own]
    leaves = [t for g in plain for f in g.factors if f is not None for t in (f.A, f.B)]
    right = torch.autograd.grad(sum(y.float().square().sum() for y in grouped_linear(x, layers(), plain)), leaves)
    for times in (1, 2):
        sum(y.float().square().sum() for y in grouped_linear(x, layers(), own)).backward()  # type: ignore[union-attr]
        found = [t.grad for places in bank.places for place in places for t in place.factors]
        assert all(torch.equal(a, times * b) for a, b in zip(found, right, strict=True) if a is not None)
    assert all(place.factors[0].grad is place.gradients[0] for places in bank.places for place in places)


@needs_kernel
def test_an_adapter_of_two_segments_gets_both_gradients_in_its_bank() -> None:
    owner = [tuple(nn.Parameter(t.detach().clone()) for t in part(0, 8, torch.float32)[1:3])]
    place = Bank([owner]).places[0][0]  # type: ignore[list-item]
    x, layer = randn(30, INPUTS, seed=0), layers()[:1]

    def gradients(*, apart: bool) -> tuple[Tensor, Tensor]:
        spans = [(0, 10), (20, 30)]
        for some in [[span] for span in spans] if apart else [spans]:
            y, = grouped_linear(x, layer, [Group(a, b, [Factors(*place.factors, 2.0, place)]) for a, b in some])
            sum(y[a:b].float().square().sum() for a, b in some).backward()  # type: ignore[union-attr]
        found = tuple(t.grad.clone() for t in place.factors if t.grad is not None)
        for factor in place.factors:
            factor.grad = None
        return found  # type: ignore[return-value]

    assert all(torch.equal(a, b) for a, b in zip(gradients(apart=False), gradients(apart=True), strict=True))


@needs_kernel
def test_an_input_whose_columns_lie_apart() -> None:
    p = Projection(randn(64, INPUTS, seed=1), None, *part(0, 8, torch.float32)[1:])
    x = randn(INPUTS, 9, seed=0).t().requires_grad_()
    like = x.detach().contiguous().requires_grad_()
    found = [[y, *torch.autograd.grad(y.float().sum(), [t, p.A, p.B])]
             for t in (x, like) for y in low_rank_linear(t, [p])]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@needs_kernel
def test_one_adapter_and_its_second_derivative() -> None:
    x = randn(2, 9, INPUTS, seed=0).requires_grad_()
    parts = [Projection(randn(out, INPUTS, seed=out), None, *part(i, 8, torch.float32)[1:])
             for i, out in enumerate(OUTPUTS)]
    leaves = [x, *(t for p in parts for t in (p.A, p.B))]

    def derivatives(run: object) -> list[Tensor]:
        outputs = run(x, parts)  # type: ignore[operator]
        first = torch.autograd.grad(sum(y.float().square().sum() for y in outputs), leaves, create_graph=True)
        return [*outputs, *first, *torch.autograd.grad(sum(t.float().square().sum() for t in first), leaves)]

    mine = derivatives(low_rank_linear)
    assert mine[0].grad_fn is not None
    assert mine[0].grad_fn.name() == "_NativeLinearBackward"
    assert max(error(a, b) for a, b in zip(mine, derivatives(reference), strict=True)) < 3 * BF16


def test_what_the_kernel_is_not_for() -> None:
    segments, x = mixed(torch.float32), randn(700, INPUTS, seed=0)
    assert not native_low_rank.fits(x.float(), OUTPUTS, segments)
    assert not native_low_rank.fits(x, (*OUTPUTS, 33), segments)
    assert not native_low_rank.fits(x.to("meta"), OUTPUTS, segments)
    assert not native_low_rank.fits(x, OUTPUTS, [Segment(0, 9, [part(0, 8, torch.float64)])])
    assert not native_low_rank.fits(x, OUTPUTS, [Segment(0, 9, [part(0, 200, torch.float32)] * 2)])


@needs_kernel
@pytest.mark.parametrize("without", ["A", "dropout"])
def test_what_goes_on_in_plain_operations(without: str) -> None:
    p = part(0, 8, torch.float32)
    A = p.A.detach() if without == "A" else p.A
    y, = low_rank_linear(randn(9, INPUTS, seed=0), [Projection(randn(64, INPUTS, seed=1), None, A, p.B, 2.0)],
                         0.5 if without == "dropout" else 0.0)
    assert y.grad_fn is not None
    assert y.grad_fn.name() == "_LowRankLinearBackward"


@needs_kernel
def test_the_operation_is_sound_for_a_compiler() -> None:
    x, parts = randn(2, 9, INPUTS, seed=0).requires_grad_(), [part(i, 8, torch.float32) for i in range(2)]
    W = [randn(out, INPUTS, seed=out) for out in OUTPUTS[:2]]
    b = [randn(OUTPUTS[0], seed=5), x.new_empty(0)]
    torch.library.opcheck(native_op._forward, (
        x, W, b, [p.A for p in parts], [p.B for p in parts], [2.0, 1.0]), atol=1e-2, rtol=1e-2)


@needs_kernel
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiler_sees_one_operation_for_layers_of_one_input() -> None:
    import transformers as hf

    torch.manual_seed(0)
    model = hf.Qwen2ForCausalLM(hf.Qwen2Config(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1)).bfloat16().train()
    ids = torch.randint(64, (2, 20))
    board = deltaw.attach(model, LoraConfig(r=8, target_modules="all-linear"), seed=0)
    factors = board.parameters("default")
    for factor in factors.values():
        nn.init.normal_(factor, std=0.1)
    board.share_inputs(lambda: model(input_ids=ids))
    layer, seen = model.model.layers[0], []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    def gradients() -> list[Tensor]:
        loss = model(input_ids=ids, labels=ids).loss
        return [loss, *torch.autograd.grad(loss, list(factors.values()))]

    right = gradients()
    layer.compile(backend=backend)
    found = gradients()
    assert sum("low_rank_linear" in target for target in seen) == 4  # q, k, v; o; gate, up; down
    assert max(error(a, b) for a, b in zip(found, right, strict=True)) < 1e-6  # the same products, run as they come


@needs_kernel
def test_a_change_below_a_rounding_of_the_output_is_not_lost() -> None:
    """What an adapter says in its first steps: added to an output that was rounded before, most of it rounds away."""
    x, W, whole = randn(4000, INPUTS, seed=0), randn(192, INPUTS, seed=1), part(1, 8, torch.float32)
    p = Projection(W, None, whole.A.detach(), 2e-3 * whole.B.detach(), whole.scale)
    change = p.scale * x.double() @ p.A.double().t() @ p.B.double().t()
    assert change.abs().mean() < 2.0**-10 * (x.double() @ W.double().t()).abs().mean()
    trained = p._replace(A=p.A.clone().requires_grad_(), B=p.B.clone().requires_grad_())

    def survives(y: Tensor) -> float:
        return float(((y.detach().double() - x.double() @ W.double().t()) * change).sum() / change.square().sum())

    apart, = reference(x, [p])
    together, = low_rank_linear(x, [trained])
    assert together.grad_fn is not None
    assert abs(survives(together) - 1) < 0.1
    assert survives(apart) < 0.5
