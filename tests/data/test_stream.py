"""Batches: each example once an epoch, the same order for a seed, and exact continuation."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltaw.data import BatchStream, Example, LabelledExample, Subset, collate, in_order, split_valid
from deltaw.errors import ConfigError, StateError

LENGTHS = np.random.default_rng(0).integers(1, 400, 1003)


def take(stream, n):
    return list(itertools.islice(stream, n))


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("drop_last", [False, True])
def test_an_epoch_has_every_example_once(lengths, drop_last):
    stream = BatchStream(range(1003), 8, seed=1, lengths=lengths, drop_last=drop_last)
    epoch = take(stream, stream.batches_per_epoch)
    assert stream.batches_per_epoch == (125 if drop_last else 126)
    assert [len(batch) for batch in epoch] == [8] * 125 + ([] if drop_last else [3])
    seen = [i for batch in epoch for i in batch]
    assert len(set(seen)) == len(seen) == (1000 if drop_last else 1003)
    assert (stream.epoch, stream.position) == (1, 0)
    assert take(stream, 125) != epoch[:125]


@given(n=st.integers(1, 40), size=st.integers(1, 9), seed=st.integers(0, 5), before=st.integers(0, 30),
       grouped=st.booleans())
def test_a_resumed_stream_goes_on_exactly(n, size, seed, before, grouped):
    lengths = LENGTHS[:n] if grouped else None
    whole = BatchStream(range(n), size, seed, lengths=lengths)
    take(whole, before)
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = BatchStream(range(n), size, seed, lengths=lengths)
    resumed.load_state_dict(state)
    assert take(resumed, 25) == take(whole, 25)
    assert resumed.state_dict() == whole.state_dict()


def test_the_seed_alone_sets_the_order():
    first, second, other = (take(BatchStream(range(50), 4, seed), 30) for seed in (3, 3, 4))
    assert first == second
    assert first != other
    torch.manual_seed(9)
    np.random.seed(9)
    assert take(BatchStream(range(50), 4, 3), 30) == first


def test_the_order_does_not_change_between_versions():
    assert take(BatchStream(range(6), 3, seed=0), 4) == [[3, 2, 5], [4, 0, 1], [1, 4, 3], [0, 2, 5]]
    assert take(BatchStream(range(6), 4, seed=0, shuffle=False), 3) == [[0, 1, 2, 3], [4, 5], [0, 1, 2, 3]]


def test_grouping_reduces_padding_and_keeps_the_batches_mixed():
    def padding(batches):
        return sum(max(LENGTHS[b]) * len(b) - sum(LENGTHS[b]) for b in batches)

    plain = take(BatchStream(range(1003), 8, 0), 126)
    stream = BatchStream(range(1003), 8, 0, lengths=LENGTHS)
    grouped = take(stream, 126)
    assert padding(grouped) < 0.15 * padding(plain)
    means = [LENGTHS[b].mean() for b in grouped[:-1]]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3  # not from short to long


@pytest.mark.parametrize("change", [{"batch_size": 5}, {"seed": 2}, {"shuffle": False}, {"drop_last": True}])
def test_a_state_of_another_stream_is_refused(change):
    state = BatchStream(range(20), 4, 1).state_dict()
    options = {"batch_size": 4, "seed": 1} | change
    with pytest.raises(StateError, match=next(iter(change))):
        BatchStream(range(20), **options).load_state_dict(state)


def test_a_state_of_other_data_or_a_damaged_one_is_refused():
    stream = BatchStream(range(20), 4, 1)
    with pytest.raises(StateError, match="'examples'"):
        stream.load_state_dict(BatchStream(range(21), 4, 1).state_dict())
    for damage in ({"position": 5}, {"epoch": -1}, {"position": "x"}):
        with pytest.raises(StateError, match="the place"):
            stream.load_state_dict(stream.state_dict() | damage)
    assert (stream.epoch, stream.position) == (0, 0)


@pytest.mark.parametrize(("options", "says"), [
    ({"batch_size": 0, "seed": -1}, "2 faults"), ({"batch_size": 8, "seed": 0, "drop_last": True}, "do not fill"),
    ({"batch_size": 2, "seed": 0, "lengths": [1]}, "one for each"),
])
def test_options_that_do_not_work(options, says):
    with pytest.raises(ConfigError, match=says):
        BatchStream(range(3), **options)
    with pytest.raises(ConfigError, match="0 do not fill a batch"):
        BatchStream([], 1, 0)


def test_in_order_gives_all_once():
    assert list(in_order(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]


@given(n=st.integers(2, 300), fraction=st.floats(0.01, 0.6), seed=st.integers(0, 9))
def test_a_split_is_a_partition(n, fraction, seed):
    if max(1, round(n * fraction)) >= n:
        return
    train, valid = split_valid(n, fraction, seed)
    assert sorted([*train, *valid]) == list(range(n))
    assert len(valid) == max(1, round(n * fraction))
    assert (split_valid(n, fraction, seed)[1] == valid).all()


def test_a_split_by_count_and_its_limits():
    assert len(split_valid(100, 7, 0)[1]) == 7
    assert (split_valid(100, 7, 0)[1] != split_valid(100, 7, 1)[1]).any()
    for amount in (0, -1, 100, 2.5):
        with pytest.raises(ConfigError, match="valid split"):
            split_valid(100, amount, 0)


def test_a_subset_is_a_view():
    part = Subset("abcdef", [4, 0, 5])
    assert [part[i] for i in range(len(part))] == ["e", "a", "f"]
    with pytest.raises(IndexError):
        part[3]


def test_collate_pads_by_length_and_not_by_id():
    pad = 2  # which is also the end token
    batch = collate([Example([5, 6, pad], [-100, 6, pad], "a:1"), Example([7], [-100], "a:2")], pad)
    assert batch["input_ids"].tolist() == [[5, 6, 2], [7, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 2], [-100, -100, -100]]
    assert {t.dtype for t in batch.values()} == {torch.int64}


@pytest.mark.parametrize(("multiple", "width"), [(1, 3), (2, 4), (8, 8), (3, 3)])
def test_collate_rounds_up(multiple, width):
    batch = collate([Example([5, 6, 7], [5, 6, 7], "a:1")], None, pad_to_multiple_of=multiple)
    assert {t.shape for t in batch.values()} == {(1, width)}
    assert batch["input_ids"][0, 3:].sum() == 0


def test_collate_of_classes():
    rows = [LabelledExample([5, 6], [0, 0], 3, "a:1"), LabelledExample([7], [0], 1, "a:2")]
    batch = collate(rows, 0)
    assert batch["labels"].tolist() == [3, 1]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    pair = collate([LabelledExample([5, 6], [0, 1], 3, "a:1"), *rows[1:]], 0)
    assert pair["token_type_ids"].tolist() == [[0, 1], [0, 0]]


@pytest.mark.parametrize("grouped", [True, False])
def test_a_token_budget_is_kept_and_every_example_comes_once(grouped: bool) -> None:
    lengths = np.random.Generator(np.random.PCG64(3)).integers(1, 60, 500)
    lengths[7] = 300  # longer than the budget: alone
    items = list(range(500))
    stream = BatchStream(items, 16, seed=5, lengths=lengths, grouped=grouped, max_tokens=200)
    for _ in range(2):
        count = stream.batches_per_epoch
        epoch = [next(stream) for _ in range(count)]
        assert sorted(i for batch in epoch for i in batch) == items
        for batch in epoch:
            assert len(batch) <= 16
            assert sum(lengths[batch]) <= 200 or batch == [7]
        assert np.mean([sum(lengths[batch]) for batch in epoch]) > 120


def test_a_budgeted_stream_goes_on_where_it_stood() -> None:
    lengths = list(range(1, 41))
    options: dict[str, Any] = {"seed": 1, "lengths": lengths, "max_tokens": 90}
    stream = BatchStream(list(range(40)), 8, **options)
    for _ in range(stream.batches_per_epoch + 3):
        next(stream)
    state = stream.state_dict()
    rest = [next(stream) for _ in range(9)]
    again = BatchStream(list(range(40)), 8, **options)
    again.load_state_dict(state)
    assert [next(again) for _ in range(9)] == rest
    with pytest.raises(StateError, match="max_tokens"):
        BatchStream(list(range(40)), 8, **{**options, "max_tokens": 91}).load_state_dict(state)


def test_a_budget_without_lengths_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_tokens"):
        BatchStream([1, 2], 1, seed=0, max_tokens=5)
