"""The teaching copy in examples/ and the real loop give the same loss at every step."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import deltaw
from deltaw.bases import load_base
from deltaw.train.progress import read_metrics


@pytest.fixture(scope="module")
def by_hand() -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / "loop_by_hand.py"
    spec = importlib.util.spec_from_file_location("loop_by_hand", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def real_losses(base: Path, data: Path, out: Path, **options: Any) -> list[float]:
    deltaw.train(deltaw.TrainConfig(
        model=str(base), data=str(data), out=str(out), valid=str(data), dtype="fp32", group_by_length=False, samples=0,
        eval_every=0, keep_best=None, **options), quiet=True)
    return [row["loss"] for row in read_metrics(out / "metrics.jsonl") if row["event"] == "step"]


def test_it_gives_the_loss_of_the_real_loop(by_hand: ModuleType, base_folder: Path, color_rows: Path,
                                            tmp_path: Path) -> None:
    base = load_base(str(base_folder), dtype="fp32")
    ours = by_hand.train(base.model, base.tokenizer, rows_of(color_rows), steps=15, peak=1e-2, warmup=2, r=4)
    real = real_losses(base_folder, color_rows, tmp_path / "out", max_steps=15, learning_rate=1e-2, warmup_steps=2,
                       lora=deltaw.LoraConfig(r=4))
    assert ours == pytest.approx(real, rel=1e-4)
    assert ours[-1] < 0.8 * ours[0]


def test_its_defaults_are_those_of_the_real_loop(by_hand: ModuleType, base_folder: Path, color_rows: Path,
                                                 tmp_path: Path) -> None:
    base = load_base(str(base_folder), dtype="fp32")
    ours = by_hand.train(base.model, base.tokenizer, rows_of(color_rows), steps=6)
    assert ours == pytest.approx(real_losses(base_folder, color_rows, tmp_path / "out", max_steps=6, warmup_steps=0),
                                 rel=1e-4)


def test_merging_by_hand_keeps_the_output(by_hand: ModuleType, base_folder: Path, color_rows: Path) -> None:
    base = load_base(str(base_folder), dtype="fp32")
    by_hand.train(base.model, base.tokenizer, rows_of(color_rows), steps=3, peak=1e-2)
    ids = torch.arange(5, 25)[None]
    base.model.eval()
    with torch.no_grad():
        before = base.model(ids).logits
        by_hand.merge(base.model)
        torch.testing.assert_close(base.model(ids).logits, before, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, by_hand.LoRALinear) for module in base.model.modules())


def test_it_runs_as_a_program(base_folder: Path, color_rows: Path, tmp_path: Path, repo: Path) -> None:
    run = subprocess.run([sys.executable, "examples/loop_by_hand.py", str(base_folder), str(color_rows), "--steps", "4",
                          "--out", str(tmp_path / "merged")], cwd=repo, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1].startswith("step     4  loss ")
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.slow
def test_it_gives_the_loss_of_the_real_loop_on_a_real_model(by_hand: ModuleType, smollm2: Path, tmp_path: Path) -> None:
    words = ["awful", "lovely", "boring", "superb", "terrible", "charming"]
    rows = [{"prompt": f"Is '{word}' praise? ({i})", "completion": "yes" if words.index(word) % 2 else "no"}
            for i, word in enumerate(words * 4)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = load_base(str(smollm2), dtype="fp32")
    ours = by_hand.train(base.model, base.tokenizer, rows, steps=4, batch_size=4)
    real = real_losses(smollm2, path, tmp_path / "out", max_steps=4, batch_size=4, warmup_steps=0)
    assert ours == pytest.approx(real, rel=1e-3)
