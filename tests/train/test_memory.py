"""Freed tensors leave the process where that was asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import deltaw
from deltaw.train import train_many
from deltaw.train.memory import settled
from tests.train.many_sets import Make, config_maker, together

HOLES = """
import sys, torch
from deltaw.train.memory import give_back, memory_in_use, release_at_once
done = sys.argv[1] == "at once" and release_at_once()
torch.ones(1 << 22)  # 16 MB, freed: from now on glibc keeps what is smaller in its heap
tensors = [torch.ones(1 << 16) for _ in range(640)]  # 256 kB each
before = memory_in_use()
del tensors[::2]
if sys.argv[1] == "between steps":
    give_back()
print(int(done), (before - memory_in_use()) >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is what this is about")
def test_holes_are_given_back(repo: Path) -> None:
    def given_back(how: str) -> tuple[int, int]:
        run = subprocess.run([sys.executable, "-c", HOLES, how], cwd=repo, capture_output=True, text=True, check=True)
        done, mib = map(int, run.stdout.split())
        return done, mib

    done, at_once = given_back("at once")
    if not done:
        pytest.skip("the C library is not glibc")
    assert at_once >= 70  # of 80
    assert given_back("between steps")[1] >= 70
    assert given_back("as it comes")[1] <= 20


@pytest.fixture
def make(base_folder: Path, color_rows: Path, tmp_path: Path) -> Make:
    return config_maker(base_folder, color_rows, tmp_path)


def test_memory_is_given_back_once_a_step(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone after each step, in a set after each pass and not for every job; where nobody asks, never."""
    calls = []
    for module in ("loop", "many"):
        monkeypatch.setattr(f"deltaw.train.{module}.give_back", lambda: calls.append(1))

    deltaw.train(make("alone", max_steps=3, release_memory=True), quiet=True)
    assert len(calls) == 3
    train_many([make("a", max_steps=3, release_memory=True), make("b", max_steps=3)], together(tmp_path), quiet=True)
    assert len(calls) == 6
    deltaw.train(make("none", max_steps=3), quiet=True)
    assert len(calls) == 6


def test_the_collector_passes_over_what_was_there_before() -> None:
    import gc

    class Node:
        pass

    mine = Node()
    assert any(other is mine for other in gc.get_objects())
    with settled():
        assert not any(other is mine for other in gc.get_objects())
        later = Node()
        assert any(other is later for other in gc.get_objects())
    assert any(other is mine for other in gc.get_objects())
