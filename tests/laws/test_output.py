"""Laws of what a model with adapters computes, for LoRA on every kind of layer."""

from __future__ import annotations

import copy

import pytest
import torch

import deltaw
from tests.laws.cases import BY_NAME, NORMAL, ROWS, Case, each_case, each_dtype, each_routable
from tests.laws.dense import dense, error, fill, same, wide


@each_dtype
def test_the_start_is_the_base(case: Case, dtype: torch.dtype) -> None:
    model, batch = case.model(dtype), case.batch(dtype)
    before = model(*batch)
    board = deltaw.attach(model, case.lora(), "a", seed=0)
    assert same(model(*batch), before, NORMAL[dtype])
    fill(board, "a", seed=3)
    assert error(model(*batch), before) > 2 * NORMAL[dtype]  # it could have failed


@each_dtype
def test_forward_is_dense_base_plus_change(case: Case, dtype: torch.dtype) -> None:
    model, batch = case.model(dtype), case.batch(dtype)
    plain = copy.deepcopy(model).requires_grad_(False)  # as in `off`: torch picks kernels by what needs a gradient
    board = deltaw.attach(model, case.lora(), "a", seed=0)
    fill(board, "a", seed=3)
    expected = dense(plain, [(board.adapter("a"), 1.0)])(*wide(batch))
    assert error(model(*batch), expected) < NORMAL[dtype]
    with torch.no_grad():  # another path: sums go into the base's output
        assert error(model(*batch), expected) < NORMAL[dtype]
    with board.off():
        assert torch.equal(model(*batch), plain(*batch))


@each_case
def test_mix_is_the_sum_of_changes(case: Case) -> None:
    model, batch = case.model(), case.batch()
    plain = copy.deepcopy(model)
    board = deltaw.attach(model, case.lora(), "a", seed=0)
    board.add("b", case.lora(lora_alpha=5))
    fill(board, "a", seed=3)
    fill(board, "b", seed=4)
    board.use({"a": 0.7, "b": -0.3})
    expected = dense(plain, [(board.adapter("a"), 0.7), (board.adapter("b"), -0.3)])(*wide(batch))
    assert error(model(*batch), expected) < NORMAL[torch.float32]


@each_case
def test_count_is_the_plan(case: Case) -> None:
    board = deltaw.attach(case.model(), case.lora(), "a")
    parameters = board.parameters("a")
    table = board.table("a")
    assert sum(p.numel() for p in parameters.values()) == sum(t.parameters for t in table)
    assert board.adapter("a").num_parameters == sum(t.site.geometry.count(t.rank) for t in table)
    assert {key.rpartition(".lora_")[0] for key in parameters if ".lora_" in key} == {t.site.name for t in table
                                                                                     if t.rank}
    empty = case.model().to("meta")
    planned = deltaw.attach(empty, case.lora(), "a")
    assert planned.table("a") == table
    assert {k: (p.shape, p.is_meta) for k, p in planned.parameters("a").items()} == {
        k: (p.shape, True) for k, p in parameters.items()}


@each_case
def test_same_seed_same_adapter(case: Case) -> None:
    config = case.lora(init_lora_weights=False)
    boards = [deltaw.attach(case.model(), config, "a", seed=seed) for seed in (5, 5, 6)]
    torch.manual_seed(99)
    first, again, other = (board.parameters("a") for board in boards)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    factors = [key for key in first if ".lora_" in key]
    assert all(not torch.equal(first[key], other[key]) for key in factors)


@each_case
def test_changing_mode_changes_no_bit(case: Case) -> None:
    model, batch = case.model(), case.batch()
    board = deltaw.attach(model, case.lora(), "a", seed=0)
    fill(board, "a", seed=3)
    before, state = model(*batch), {k: t.clone() for k, t in model.state_dict().items()}
    for _ in range(10):
        model.train()
        model.eval()
    assert torch.equal(model(*batch), before)
    assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())


@each_routable
def test_routed_rows_are_separate_runs(case: Case) -> None:
    model, batch = case.model(), case.batch()
    board = deltaw.attach(model, case.lora(), "a", seed=0)
    board.add("b", case.lora())
    fill(board, "a", seed=3)
    fill(board, "b", seed=4)
    for names in (["a", None, "b", "a"], ["b"] * ROWS, [None] * ROWS, ["b", "a", "b", "b"], ["a", "b"]):
        if len(names) < ROWS and not case.beams:
            continue
        repeats = ROWS // len(names)  # fewer names than rows: each stands for consecutive rows
        outputs = {}
        for grad in (True, False):
            with torch.set_grad_enabled(grad), board.route(names):
                outputs[grad] = model(*batch)
        for i in range(ROWS):
            board.use(names[i // repeats])
            expected = model(*case.rows_of(batch, [i]))
            for got in outputs.values():
                row, = case.rows_of((got,), [i])
                assert error(row, expected) < NORMAL[torch.float32], (names, i)


@each_routable
def test_routed_rows_differ_by_adapter(case: Case) -> None:
    model, batch = case.model(), case.batch(rows=1)
    both = tuple(torch.cat([t, t], case.row_dim) for t in batch)
    board = deltaw.attach(model, case.lora(), "a", seed=0)
    board.add("b", case.lora())
    fill(board, "a", seed=3)
    fill(board, "b", seed=4)
    with board.route(["a", "b"]):
        output = model(*both)
    first, second = case.rows_of((output,), [0]), case.rows_of((output,), [1])
    assert error(first[0], second[0]) > 0.01


@pytest.mark.parametrize("name", ["linear", "conv1d_of_transformers", "conv2d_grouped", "embedding_padded"])
def test_dropout_is_on_in_training_only(name: str) -> None:
    case = BY_NAME[name]
    model, batch = case.model(), case.batch()
    board = deltaw.attach(model, case.lora(lora_dropout=0.5), "a", seed=0)
    fill(board, "a", seed=3)
    plain = case.model()
    expected = dense(plain, [(board.adapter("a"), 1.0)])(*wide(batch))
    assert error(model(*batch), expected) < NORMAL[torch.float32]
    model.train()
    draws = [model(*batch) for _ in range(2)]
    assert not torch.equal(*draws)
    with board.route(["a", None, "a", None]):
        routed = [model(*batch) for _ in range(2)]
    assert torch.equal(routed[0][1], routed[1][1])
    assert not torch.equal(routed[0], routed[1])


@pytest.mark.parametrize("name", ["linear", "conv2d", "embedding", "experts", "mha_both", "llama", "saved_head"])
def test_deep_copy_is_independent(name: str) -> None:
    case = BY_NAME[name]
    model, batch = case.model(), case.batch()
    board = deltaw.attach(model, case.lora(), "a", seed=0)
    fill(board, "a", seed=3)
    output = model(*batch)
    twin = copy.deepcopy(model)
    assert deltaw.board(twin) is not board
    deltaw.board(twin).use(None)
    fill(deltaw.board(twin), "a", seed=4)
    assert torch.equal(model(*batch), output)
    assert torch.equal(twin(*batch), case.model()(*batch))
    deltaw.detach(twin)
    assert torch.equal(model(*batch), output)
