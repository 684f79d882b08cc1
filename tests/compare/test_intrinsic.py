"""The search for d90, against a figure whose crossing is known."""

from __future__ import annotations

import math

import pytest

from deltaw.compare.intrinsic import CLOSE, smallest


@pytest.mark.parametrize("crossing", [17, 100, 1608, 60_000])
def test_bisection_finds_the_crossing_within_its_factor(crossing: int) -> None:
    tried: list[int] = []

    def figure(d: int) -> float:
        tried.append(d)
        return 0.9 if d >= crossing else 0.5

    d90, curve, note = smallest(figure, 0.8, 16, 65_536)
    assert d90 is not None
    assert crossing <= d90 <= math.ceil(crossing * CLOSE)
    assert note == ""
    assert [d for d, _ in curve] == sorted(tried)
    assert len(tried) <= 9


def test_bounds_that_do_not_enclose_it_are_said() -> None:
    assert smallest(lambda d: 0.1, 0.8, 16, 64) == (None, ((64, 0.1),), "64 dimensions do not reach the target")
    d90, _, note = smallest(lambda d: 0.9, 0.8, 16, 64)
    assert d90 == 16
    assert "at most" in note


def test_a_run_that_failed_does_not_reach_it() -> None:
    d90, curve, _ = smallest(lambda d: None if d < 32 else 0.9, 0.8, 16, 64)
    assert d90 is not None
    assert d90 >= 32
    assert all(d >= 32 for d, _ in curve)
