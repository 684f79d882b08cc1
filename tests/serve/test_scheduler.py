"""The scheduler against its promises, over random arrivals, cancellations and adapters."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.serve.places import WORTH_COPYING, Places
from deltaw.serve.request import BASE, Blend, SamplingParams, Sequence
from deltaw.serve.scheduler import QueueFull, Scheduler, Step

PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=60)
ADAPTERS = st.integers(0, 3)


def sequence(number: int, prompt: Any = (1,), adapter: int = 0, length: int = 4) -> Sequence:
    blend: Blend = ((adapter, 1.0),) if adapter else BASE
    return Sequence(number, tuple(prompt), blend, SamplingParams(max_tokens=length), lambda event: None)


def compute(scheduler: Scheduler, step: Step) -> list[Sequence]:
    """What the engine does with a step: a token for whoever is complete; those that are finished leave."""
    scheduler.done(step)
    finished = []
    for chunk in step.chunks:
        if chunk.completes:
            chunk.sequence.written.append(len(chunk.sequence.written) % 3)
            if len(chunk.sequence.written) == chunk.sequence.params.max_tokens:
                scheduler.remove(chunk.sequence)
                finished.append(chunk.sequence)
    return finished


def check(scheduler: Scheduler, step: Step, budget: int) -> None:
    """Places conserved, owners consistent, budgets kept, and every token computed once, in order."""
    places = scheduler.places.all
    owned = [p.owner for p in places if p.owner is not None]
    assert len(owned) == len(scheduler.running) == len({id(s) for s in scheduler.running})
    assert all(places[s.place].owner is s for s in scheduler.running)
    assert len(scheduler.places.free) + len(scheduler.running) == len(places)
    assert sum(c.end - c.start for c in step.chunks if c.sequence.pending > 1) <= budget
    for chunk in step.chunks:
        assert chunk.start == chunk.sequence.computed < chunk.end <= chunk.sequence.length
    running = {id(c.sequence) for c in step.chunks}
    assert all(id(s) in running for s in scheduler.running if s.pending == 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(PROMPTS, ADAPTERS, st.integers(1, 6), st.booleans()), min_size=1, max_size=25),
       st.integers(1, 4), st.integers(1, 40), st.integers(0, 10**6))
def test_all_that_is_asked_is_computed_and_nothing_is_lost(asked: list[Any], places: int, budget: int,
                                                           seed: int) -> None:
    rng = random.Random(seed)
    scheduler = Scheduler(places=places, prefill_tokens=budget)
    waiting = [sequence(i, prompt, adapter, length) for i, (prompt, adapter, length, _) in enumerate(asked)]
    cancelled = {i for i, (*_, cancel) in enumerate(asked) if cancel}
    finished: list[Sequence] = []
    for _ in range(3000):
        for _ in range(rng.randrange(4)):
            if waiting:
                scheduler.add(waiting.pop(0))
        victims = [s for s in scheduler.sequences() if s.number in cancelled]
        if victims and rng.random() < 0.5:
            cancelled.discard(victims[0].number)
            scheduler.remove(victims[0])
            finished.append(victims[0])
        step = scheduler.plan()
        check(scheduler, step, budget)
        finished += compute(scheduler, step)
        if scheduler.idle and not waiting:
            break
    assert sorted(s.number for s in finished) == list(range(len(asked)))
    assert len(scheduler.places.free) == places


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(PROMPTS, ADAPTERS, st.integers(1, 4)), min_size=1, max_size=20), st.integers(1, 4))
def test_what_is_reused_was_computed_for_the_same_adapter(asked: list[Any], places: int) -> None:
    scheduler = Scheduler(places=places)
    content: list[tuple[Blend, list[int]]] = [(BASE, []) for _ in range(places)]
    scheduler.add(*(sequence(i, prompt, adapter, length) for i, (prompt, adapter, length) in enumerate(asked)))
    while not scheduler.idle:
        step = scheduler.plan()
        taken = [c.sequence for c in step.chunks if c.start == c.sequence.reused and not c.sequence.written]
        for start in step.starts:
            source = start.place if start.copy_from is None else start.copy_from
            user = next(s for s in scheduler.running if s.place == start.place)
            blend, held = content[source]
            assert not start.reused or (blend == user.blend and held[:start.reused] == list(user.prompt[:start.reused]))
            assert start.reused < len(user.prompt)
            content[start.place] = user.blend, held[:start.reused]
        assert len(taken) >= len(step.starts)
        for chunk in step.chunks:
            blend, held = content[chunk.sequence.place]
            assert len(held) == chunk.start
            content[chunk.sequence.place] = blend, held + chunk.sequence.tokens(chunk.start, chunk.end)
        compute(scheduler, step)


def test_a_greedy_adapter_does_not_starve_another() -> None:
    scheduler = Scheduler(places=2)
    scheduler.add(*(sequence(i, adapter=1, length=5) for i in range(50)))
    for _ in range(12):
        compute(scheduler, scheduler.plan())
    late = sequence(99, adapter=2, length=5)
    scheduler.add(late)
    for _ in range(6):
        compute(scheduler, scheduler.plan())
    assert late.place >= 0 or late.written


def test_adapters_get_equal_shares() -> None:
    scheduler = Scheduler(places=1)
    scheduler.add(*(sequence(i, adapter=1, length=4) for i in range(40)))
    scheduler.add(*(sequence(100 + i, adapter=2, length=8) for i in range(40)))
    served: dict[int, int] = {1: 0, 2: 0}
    for _ in range(240):
        for done in compute(scheduler, scheduler.plan()):
            served[done.blend[0][0]] += done.room
    assert served[1] == pytest.approx(served[2], rel=0.15)


def test_one_that_waits_for_memory_is_not_passed_for_ever() -> None:
    scheduler = Scheduler(places=2)
    big = sequence(0, adapter=3, length=2)
    scheduler.add(sequence(1, adapter=1, length=6))
    compute(scheduler, scheduler.plan())
    scheduler.add(big, *(sequence(10 + i, adapter=1, length=6) for i in range(20)))

    def admits(blend: Blend) -> bool:  # alone only
        return blend != big.blend or all(s.blend == blend for s in scheduler.running)

    for _ in range(30):
        compute(scheduler, scheduler.plan(admits))
    assert len(big.written) == 2


def test_one_whose_adapter_is_being_read_is_passed_until_it_is_there() -> None:
    scheduler = Scheduler(places=1)
    late, others = sequence(0, adapter=3, length=2), [sequence(1 + i, adapter=1, length=2) for i in range(4)]
    scheduler.add(late, *others)
    read: set[Blend] = {others[0].blend}
    ended: list[int] = []
    for turn in range(12):
        if turn == 3:
            read.add(late.blend)
        ended += [s.number for s in compute(scheduler, scheduler.plan(is_read=read.__contains__))]
    assert ended[0] == 1
    assert sorted(ended) == [0, 1, 2, 3, 4]
    assert ended.index(0) < 3, "nothing was given to it yet, so that it is next as soon as it is there"


def test_nobody_passes_one_that_waits_for_memory_although_it_is_not_read() -> None:
    scheduler = Scheduler(places=2)
    big, small = sequence(0, adapter=3), sequence(1, adapter=1)
    scheduler.add(big, small)
    step = scheduler.plan(admits=lambda blend: blend != big.blend, is_read=lambda blend: blend != big.blend)
    assert not step.chunks


def test_a_full_queue_takes_all_of_a_request_or_nothing() -> None:
    scheduler = Scheduler(places=1, max_waiting=3)
    scheduler.add(sequence(0), sequence(1))
    with pytest.raises(QueueFull):
        scheduler.add(sequence(2), sequence(3), sequence(4))
    assert scheduler.waiting == 2
    scheduler.add(sequence(2), sequence(3))  # one of the four takes the place
    scheduler.plan()
    assert (len(scheduler.running), scheduler.waiting) == (1, 3)
    with pytest.raises(QueueFull):
        scheduler.add(sequence(5))


def test_answers_to_one_prompt_compute_it_once() -> None:
    scheduler = Scheduler(places=4)
    prompt = list(range(40))
    scheduler.add(*(sequence(i, prompt, length=3) for i in range(3)))
    first = scheduler.plan()
    assert [(c.start, c.end) for c in first.chunks] == [(0, 40)]
    compute(scheduler, first)
    second = scheduler.plan()
    assert sorted((c.start, c.end) for c in second.chunks) == [(39, 40), (39, 40), (40, 41)]
    assert [start.copy_from for start in second.starts] == [0, 0]


def test_a_place_remembers_and_is_found_again() -> None:
    places = Places(3)
    first, other = sequence(0, range(WORTH_COPYING + 4)), sequence(1, range(WORTH_COPYING + 4), adapter=1)
    assert places.claim(first) is not None
    first.computed = first.length
    places.leave(first)
    start = places.claim(other)
    assert start is not None
    assert start.reused == 0
    again = sequence(2, [*range(WORTH_COPYING + 2), 77, 78])
    start = places.claim(again)
    assert start is not None
    assert (start.place, start.reused, start.copy_from) == (0, WORTH_COPYING + 2, None)
