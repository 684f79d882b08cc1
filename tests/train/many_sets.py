"""What the tests of many jobs share: jobs that differ in everything, and the comparison with runs alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import deltaw
from deltaw.train import ManyConfig
from deltaw.train.progress import read_metrics

Make = Callable[..., deltaw.TrainConfig]


def config_maker(base: Path, rows: Path, out: Path) -> Make:
    """A function that makes the config of a run `name` in `out`/`place`/`name`."""
    def make(name: str, place: str = "many", **options: Any) -> deltaw.TrainConfig:
        defaults = {"model": str(base), "data": str(rows), "out": str(out / place / name), "name": name,
                    "dtype": "fp32", "max_steps": 12, "learning_rate": 1e-3, "eval_every": 0, "save_every": 0,
                    "eval_rows": 4, "samples": 0, "max_new_tokens": 3, "compile": "off",
                    "lora": deltaw.LoraConfig(r=4)}
        return deltaw.TrainConfig(**{**defaults, **options})

    return make


def unlike(make: Make, place: str = "many", **options: Any) -> list[deltaw.TrainConfig]:
    """Four runs that differ in rank, alpha, targets, dropout, rates, schedule, batches, lengths, seeds and loss."""
    lora = deltaw.LoraConfig
    return [
        make("a", place, lora=lora(r=4, lora_dropout=0.2), **options),
        make("b", place, lora=lora(r=8, lora_alpha=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5), seed=3,
             batch_size=5, schedule="cosine", learning_rate=3e-3, **options),
        make("c", place, lora=lora(r=1, use_rslora=True), label_smoothing=0.1, max_length=9, weight_decay=0.1,
             batch_size=2, grad_accumulation=3, betas=(0.8, 0.95), **options),
        make("d", place, lora=lora(r=16, exclude_modules=["down_proj"]), z_loss=1e-3, schedule="constant",
             loraplus_lr_ratio=4.0, max_grad_norm=0.1, **options),
    ]


def together(out: Path, **options: Any) -> ManyConfig:
    return ManyConfig(**{"out": str(out / "set"), "control": False, **options})


def differences(one: Path, other: Path) -> tuple[float, float]:
    """The largest relative difference of a tensor (in norm), and of a loss, between two finished runs."""
    ours, theirs = deltaw.load(one).sites, deltaw.load(other).sites
    assert ours.keys() == theirs.keys()
    tensors = max(float((tensor - theirs[site].tensors[name]).norm() / tensor.norm())
                  for site, delta in ours.items() for name, tensor in delta.tensors.items())
    losses = [[(row["event"], row["step"], row["loss"]) for row in read_metrics(folder / "metrics.jsonl")]
              for folder in (one, other)]
    assert [row[:2] for row in losses[0]] == [row[:2] for row in losses[1]]
    return tensors, max(abs(a[2] - b[2]) / abs(a[2]) for a, b in zip(*losses, strict=True))
