"""`deltaw train --jobs`: adapters from a file, a failed job in the exit code, faults before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltaw.cli.main import main
from tests.train.conftest import base_folder, color_rows

__all__ = ["base_folder", "color_rows"]


def jobs_file(folder: Path, base: Path, rows: Path, **second: object) -> Path:
    task = {"dataset": "colors", "max_steps": 6, "eval_every": 0, "samples": 0}
    path = folder / "jobs.yaml"
    path.write_text(json.dumps({
        "base": {"model": str(base), "dtype": "fp32"}, "together": {"out": str(folder / "set")},
        "datasets": [{"name": "colors", "data": str(rows), "eval_rows": 4}],
        "adapters": [{"name": "one", "r": 2}, {"name": "two", "r": 4}],
        "tasks": [{**task, "adapter": "one", "out": str(folder / "one")},
                  {**task, "adapter": "two", "out": str(folder / "two"), **second}]}))
    return path


def test_a_set_and_its_report(base_folder: Path, color_rows: Path, tmp_path: Path,
                              capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--jobs", str(jobs_file(tmp_path, base_folder, color_rows)), "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert {name: job["status"] for name, job in found["jobs"].items()} == {"one": "finished", "two": "finished"}
    assert found["failed"] == []
    assert "together: passes of up to 1,024 tokens" in err
    for name in ("one", "two"):
        assert {"adapter_model.safetensors", "report.html"} <= {p.name for p in (tmp_path / name).iterdir()}


def test_one_failed_job_is_told_and_fails_the_command(base_folder: Path, color_rows: Path, tmp_path: Path,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    file = jobs_file(tmp_path, base_folder, color_rows, learning_rate=1e30, schedule="constant", warmup_steps=0,
                     max_grad_norm=0)
    assert main(["train", "--jobs", str(file)]) == 1
    out, err = capsys.readouterr()
    assert "deltaw train: job 'two': failed: " in err
    assert "go on with the set with --resume" in err
    assert "Traceback" not in err
    assert "finished" in out
    assert (tmp_path / "one" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "two" / "adapter_model.safetensors").exists()


def test_faults_name_job_key_and_remedy_and_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = jobs_file(tmp_path, tmp_path / "nowhere", tmp_path / "none.jsonl", learning_rat=1)
    assert main(["train", "--jobs", str(file), "--r", "4"]) == 2
    assert "--r: does not go with --jobs" in capsys.readouterr().err
    assert main(["train", "--jobs", str(file)]) == 2
    assert "jobs.yaml: task 2 'two': 'learning_rat': is unknown" in (err := capsys.readouterr().err)
    assert "Did you mean learning_rate?" in err
