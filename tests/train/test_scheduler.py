"""The scheduler: budgets, shares and that nobody waits long, over arbitrary sets of jobs."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaw.train.scheduler import Scheduler, fill

SIZES = st.lists(st.integers(1, 200), min_size=1, max_size=8)


@given(SIZES, st.integers(1, 150))
def test_passes_hold_every_piece_once_and_keep_to_the_budget(sizes: list[int], budget: int) -> None:
    passes = fill(sizes, budget)
    assert sorted(piece for members in passes for piece in members) == list(range(len(sizes)))
    for members in passes:
        assert sum(sizes[i] for i in members) <= budget or len(members) == 1
        assert members == sorted(members)


@given(st.lists(st.tuples(st.integers(1, 200), st.sampled_from([0.5, 1.0, 2.0, 3.0])), min_size=1, max_size=6),
       st.integers(1, 300))
def test_budget_progress_and_fairness(jobs: list[tuple[int, float]], budget: int) -> None:
    """Every round does something within its budget; who is passed over is overtaken by a bounded amount only."""
    scheduler = Scheduler(budget)
    sizes = {str(n): size for n, (size, _) in enumerate(jobs)}
    priority = {str(n): weight for n, (_, weight) in enumerate(jobs)}
    for name in sizes:
        scheduler.join(name, priority[name])
    for _ in range(25):
        chosen = scheduler.choose(sizes)
        assert chosen
        assert len(set(chosen)) == len(chosen)
        assert len(chosen) == 1 or sum(sizes[name] for name in chosen) <= budget
        for waiting in sizes.keys() - set(chosen):
            for served in chosen:
                lead = scheduler.served[served] - scheduler.served[waiting]
                assert lead <= budget / priority[served] + sizes[served] / priority[served] + 1e-9


@given(SIZES.filter(lambda sizes: len(sizes) > 1))
def test_where_all_fit_all_step_in_every_round(sizes: list[int]) -> None:
    scheduler = Scheduler(sum(sizes))
    tokens = {str(n): size for n, size in enumerate(sizes)}
    for name in tokens:
        scheduler.join(name)
    assert all(set(scheduler.choose(tokens)) == set(tokens) for _ in range(5))


def test_shares_follow_priorities() -> None:
    scheduler = Scheduler(budget=10)
    for name, priority in (("a", 1.0), ("b", 2.0), ("c", 1.0)):
        scheduler.join(name, priority)
    given_tokens: Counter[str] = Counter()
    for _ in range(400):
        for name in scheduler.choose({"a": 10, "b": 10, "c": 5}):
            given_tokens[name] += 5 if name == "c" else 10
    assert given_tokens["b"] / given_tokens["a"] == pytest.approx(2.0, rel=0.05)
    assert given_tokens["c"] / given_tokens["a"] == pytest.approx(1.0, rel=0.05)


def test_a_late_or_rested_job_has_nothing_to_catch_up_on() -> None:
    scheduler = Scheduler(budget=10)
    scheduler.join("a")
    for _ in range(100):
        scheduler.choose({"a": 10})
    scheduler.join("b")
    counted = Counter(name for _ in range(40) for name in scheduler.choose({"a": 10, "b": 10}))
    assert abs(counted["a"] - counted["b"]) <= 2


@given(SIZES, st.integers(1, 100), st.integers(0, 20))
def test_a_restored_account_makes_the_same_choices(sizes: list[int], budget: int, before: int) -> None:
    tokens = {str(n): size for n, size in enumerate(sizes)}
    one, other = Scheduler(budget), Scheduler(budget)
    for name in tokens:
        one.join(name)
        other.join(name)
    for _ in range(before):
        one.choose(tokens)
    other.load_state_dict(one.state_dict())
    assert [one.choose(tokens) for _ in range(10)] == [other.choose(tokens) for _ in range(10)]
