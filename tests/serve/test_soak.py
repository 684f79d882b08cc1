"""A short soak: random clients, and every answer the right one. `benchmarks/soak.py` is the long one."""

from __future__ import annotations

import warnings
from pathlib import Path

from benchmarks.soak import soak


def test_a_short_soak_leaves_nothing_and_answers_right(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, while it makes the expected answers
        found = soak(tmp_path, seconds=4, clients=4, seed=0)
    assert found["ok"], found
    assert sum(found["done"].values()) > found["done"]["right"] > 0
    assert found["done"]["right stream"] > 0
    assert found["done"]["right blend"] > 0
