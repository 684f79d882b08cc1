"""Batches made ahead are the same batches in the same order, and the place that is saved is that of the used ones."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import deltaw
from deltaw.train.examples import ExampleBatches
from deltaw.train.prefetch import Prefetched
from deltaw.train.state import Batch


class Counting:
    """Batches that hold their number; the one at `fails_at` cannot be made."""

    def __init__(self, fails_at: int = -1) -> None:
        self.at, self.fails_at, self.made = 0, fails_at, threading.Semaphore(0)

    def __next__(self) -> Batch:
        if self.at == self.fails_at:
            raise ValueError(f"batch {self.at}")
        self.at += 1
        self.made.release()
        return Batch({"labels": torch.tensor([self.at])}, (threading.current_thread().name,))

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.at = state["at"]


def number(batch: Batch) -> int:
    return int(batch.inputs["labels"])


def test_one_batch_lies_ready_and_the_place_is_that_of_the_used_ones() -> None:
    before = set(threading.enumerate())
    inner = Counting()
    with Prefetched(inner) as batches:
        assert batches.state_dict() == {"at": 0}
        for n in (1, 2, 3):
            batch = next(batches)
            assert number(batch) == n
            assert batch.where[0].startswith("deltaw-batches")
            assert batches.state_dict() == {"at": n}
        for _ in range(4):  # the fourth is made without being asked for, and no fifth
            assert inner.made.acquire(timeout=10)
        assert not inner.made.acquire(timeout=0.05)
        batches.load_state_dict({"at": 7})
        assert batches.state_dict() == {"at": 7}
        assert number(next(batches)) == 8
    assert set(threading.enumerate()) <= before


def test_what_fails_is_raised_when_its_turn_comes() -> None:
    with Prefetched(Counting(fails_at=2)) as batches:
        assert [number(next(batches)) for _ in range(2)] == [1, 2]
        with pytest.raises(ValueError, match="batch 2"):
            next(batches)
        assert batches.state_dict() == {"at": 2}


def test_a_run_saves_the_place_of_used_batches(base_folder: Path, color_rows: Path, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    def config(out: str, **options: Any) -> deltaw.TrainConfig:
        return deltaw.TrainConfig(model=str(base_folder), data=str(color_rows), out=str(tmp_path / out), dtype="fp32",
                                  batch_size=4, max_steps=4, save_every=2, eval_every=0, samples=0, eval_rows=4,
                                  compile="off", lora=deltaw.LoraConfig(r=2, lora_dropout=0.2), **options)

    def losses(out: str) -> list[float]:
        rows = map(json.loads, (tmp_path / out / "metrics.jsonl").read_text().splitlines())
        return [row["loss"] for row in rows if row["event"] == "step"]

    made: list[tuple[str, ...]] = []
    real: Callable[[ExampleBatches], Batch] = ExampleBatches.__next__

    def counted(self: ExampleBatches) -> Batch:
        batch = real(self)
        made.append(tuple(batch.where))
        return batch

    monkeypatch.setattr(ExampleBatches, "__next__", counted)
    deltaw.train(config("whole"), quiet=True)
    assert len(made) in (4, 5)  # the fifth may not have been begun
    facts = json.loads((tmp_path / "whole" / "checkpoints" / "step-00000002" / "state.json").read_text())
    assert facts["batches"]["position"] == 2
    (tmp_path / "whole" / "checkpoints" / "step-00000004").rename(tmp_path / "gone")
    whole, first = losses("whole"), made[:4]
    made.clear()
    deltaw.train(config("whole", resume=True), quiet=True)
    assert losses("whole") == whole
    assert made[:2] == first[2:4]
