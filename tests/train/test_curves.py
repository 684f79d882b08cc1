"""Fifty steps of a run, fused, shared, packed and prefetched, against plain operations over padded batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import deltaw
from deltaw.core.layers import AdaptedLinear
from deltaw.data import collate
from deltaw.train.examples import load_examples
from deltaw.train.optimizer import schedule, warmup_of
from deltaw.train.progress import read_metrics

STEPS = 50


def plain_curve(config: deltaw.TrainConfig, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The losses of a loop over transformers' own loss, with `core/methods/lora.py` for each layer by itself."""
    base, examples = load_examples(config)
    model = base.model.train()
    board = deltaw.attach(model, config.lora, name=config.name, seed=config.seed)
    parameters = list(board.parameters(config.name).values())
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    factor = schedule("linear", total=STEPS, warmup=warmup_of(STEPS, ratio=config.warmup_ratio, steps=None))
    stream, losses = examples.stream(), []
    with monkeypatch.context() as patched:
        patched.setattr(AdaptedLinear, "obstacle", lambda self, x: "plain operations are what this is about")
        for step in range(STEPS):
            batch = collate(next(stream), base.tokenizer.pad_token_id)
            loss = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.param_groups[0]["lr"] = config.learning_rate * factor(step)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    return losses


def curve(config: deltaw.TrainConfig) -> list[float]:
    computed = deltaw.train(config, quiet=True).checks["computed"]
    assert "packing: examples lie end to end" in computed
    return [row["loss"] for row in read_metrics(Path(config.out) / "metrics.jsonl") if row["event"] == "step"]


def furthest(mine: list[float], its: list[float]) -> float:
    assert len(mine) == len(its) == STEPS
    return max(abs(a - b) / abs(b) for a, b in zip(mine, its, strict=True))


def options(**given: Any) -> dict[str, Any]:
    return {"dtype": "fp32", "max_steps": STEPS, "batch_size": 4, "eval_every": 0, "save_every": 0, "samples": 0,
            "eval_rows": 1, "compile": "off", "lora": deltaw.LoraConfig(r=4, target_modules="all-linear"), **given}


def test_a_small_network(base_folder: Path, color_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(base_folder, color_rows, tmp_path)
    mine, its = curve(config), plain_curve(config, monkeypatch)
    assert mine[-1] < 0.95 * mine[0]
    assert furthest(mine, its) <= 1e-5


def test_a_small_network_in_bfloat16(base_folder: Path, color_rows: Path, tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's few tokens over random weights are at the mercy of rounding, a run a little; the mean of runs is not."""
    total, plain, exact = 0.0, 0.0, 0.0
    for seed in range(3):
        config = small(base_folder, color_rows, tmp_path, dtype="bf16", seed=seed)
        mine, its = curve(config), plain_curve(config, monkeypatch)
        assert mine[-1] < 0.95 * mine[0]
        assert furthest(mine, its) <= 2e-2
        total, plain = total + sum(mine), plain + sum(its)
        exact += sum(curve(small(base_folder, color_rows, tmp_path, seed=seed)))
    assert total == pytest.approx(plain, rel=1e-3)
    assert abs(total - exact) <= max(abs(plain - exact), 1e-3 * exact)


def small(base: Path, rows: Path, folder: Path, **given: Any) -> deltaw.TrainConfig:
    given = options(learning_rate=2e-3, batch_size=16, **given)
    out = folder / f"{given['dtype']}-{given.get('seed')}"
    return deltaw.TrainConfig(model=str(base), data=str(rows), out=str(out), **given)


@pytest.mark.slow
def test_a_real_model(smollm2: Path, short_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = deltaw.TrainConfig(model=str(smollm2), data=str(short_rows), out=str(tmp_path / "out"), **options(
        learning_rate=2e-4, max_length=16, batch_size=2, train_on="all"))
    assert furthest(curve(config), plain_curve(config, monkeypatch)) <= 1e-5


@pytest.fixture
def short_rows(shared_data: Path, tmp_path: Path) -> Path:
    """The first problems of GSM8K as prompts with completions."""
    problems = map(json.loads, (shared_data / "gsm8k" / "train.jsonl").read_text().splitlines()[:64])
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": row["question"], "completion": row["answer"]}) + "\n"
                            for row in problems))
    return path
