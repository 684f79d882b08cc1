"""What counts as the same loss, and that a set of jobs asks it with the format of the base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from deltaw.train import ManyConfig, TrainMany, joint
from deltaw.train.agreement import same_loss
from tests.train.many_sets import Make, config_maker


@pytest.fixture
def make(base_folder: Path, color_rows: Path, tmp_path: Path) -> Make:
    return config_maker(base_folder, color_rows, tmp_path)


@pytest.mark.parametrize(("dtype", "share"), [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 3e-2),
                                              (torch.float16, 3e-2)])
def test_losses_may_differ_by_what_the_format_of_the_base_rounds(dtype: torch.dtype, share: float) -> None:
    loss = torch.tensor(600.0, dtype=torch.float64)
    assert same_loss(loss * (1 + share / 2), loss, dtype)
    assert not same_loss(loss * (1 + 2 * share), loss, dtype)
    assert not same_loss(loss * float("nan"), loss, dtype)


@pytest.mark.parametrize(("dtype", "off", "shares"), [("bf16", 2e-3, True), ("bf16", 0.1, False), ("fp32", 2e-3, False),
                                                      ("fp32", 0.0, True)])
def test_jobs_share_passes_where_a_loss_moves_by_no_more_than_its_format_rounds(
        make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, off: float, shares: bool) -> None:
    """The loss is float32 in every format; products of more rows may round otherwise, as they do with AMX."""
    plain = joint.joint_losses

    def moved(*args: object) -> list[Tensor]:
        return [loss * (1 + off) for loss in plain(*args)]  # type: ignore[arg-type]

    monkeypatch.setattr(joint, "joint_losses", moved)
    jobs = [make(name, dtype=dtype) for name in "ab"]
    with TrainMany(jobs, ManyConfig(out=str(tmp_path / "set"), control=False), quiet=True) as many:
        assert [not job.why_apart for job in many.jobs.values()] == [shares] * 2
        assert all("beside a neighbour" in job.why_apart for job in many.jobs.values()) != shares
        assert (many.bytes_per_token > 0) == shares
        assert many.round()
