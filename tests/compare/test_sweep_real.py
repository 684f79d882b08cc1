"""A rank sweep on real data is one process over one base, with the results of a run for each rank."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import deltaw
from deltaw.compare import SweepConfig, sweep
from tests.train.many_sets import differences

RANKS = (1, 2, 4, 8, 16, 32)


@pytest.mark.slow
def test_a_sweep_of_six_ranks_is_six_runs(smollm2: Path, shared_data: Path, tmp_path: Path) -> None:
    """Figures within 1e-5 and tensors within 1e-3 in norm after few steps, as in `tests.train.test_many_real`."""
    source = shared_data / "instructions_human" / "seed_tasks.jsonl"
    if not source.is_file():
        pytest.skip("the instructions are not in ../shared/data")
    tasks = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()[:40]]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": task["instruction"], "completion": task["instances"][0]["output"]})
                            + "\n" for task in tasks if task["instances"][0]["output"].strip()), encoding="utf-8")
    train = deltaw.TrainConfig(
        model=str(smollm2), data=str(rows), out=str(tmp_path / "together"), dtype="fp32", max_steps=3, batch_size=1,
        max_length=48, eval_rows=2, eval_every=0, warmup_steps=0, schedule="constant", eps=1e-4, doctor_steps=2)
    told: list[str] = []
    found = sweep(SweepConfig(train=train, ranks=RANKS, seeds=(0,)), told.append)
    assert [row.together for row in found.rows] == [6] * 6, found.rows
    assert told[0].startswith("6 runs together: r=1, seed 0; r=2")
    assert not any("..." in line for line in told[1:])  # no rank had a process of its own
    assert found.best is not None
    alone = SweepConfig(train=replace(train, out=str(tmp_path / "alone")), ranks=(1, 32), seeds=(0,), together="off")
    for row in sweep(alone, lambda _: None).rows:
        assert row.together == 1
        joint = next(other for other in found.rows if other.arm == row.arm)
        assert joint.figures["loss"].mean == pytest.approx(row.figures["loss"].mean, rel=1e-5)
        tensors, losses = differences(*(tmp_path / way / "runs" / row.arm / "all" / "seed-0" / "adapter"
                                        for way in ("alone", "together")))
        assert losses <= 1e-5
        assert tensors <= 1e-3
