"""What of an adapter a tuning trains, and what it leaves as it was drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import deltaw
from deltaw.bases import load_base
from deltaw.train.tuning import LoraTuning


def trained(base: Path, rows: Path, out: Path, **options: Any) -> deltaw.Adapter:
    """The adapter of a run of five steps; the doctor demands a gradient of every tensor that is trained."""
    deltaw.train(deltaw.TrainConfig(
        model=str(base), data=str(rows), out=str(out), dtype="fp32", max_steps=5, batch_size=4, learning_rate=1e-2,
        warmup_steps=0, eval_every=0, samples=0, eval_rows=4, **options), quiet=True)
    return deltaw.load(out)


@pytest.mark.parametrize("checkpointing", ["off", "layer", "attention"])
def test_lora_fa_leaves_every_a_as_it_was_drawn(base_folder: Path, color_rows: Path, tmp_path: Path,
                                                checkpointing: str) -> None:
    config = deltaw.LoraConfig(r=2, target_modules="all-linear")
    adapter = trained(base_folder, color_rows, tmp_path / "out", lora=config, freeze_a=True,
                      gradient_checkpointing=checkpointing)
    model = load_base(str(base_folder), dtype="fp32").model
    start = deltaw.attach(model, config, name="default", seed=0).adapter("default")
    assert adapter.sites.keys() == start.sites.keys()
    for site, delta in adapter.sites.items():
        assert torch.equal(delta.A, start.sites[site].A), site
        assert delta.B.any(), site


def test_lora_fa_trains_an_embeddings_a_which_starts_at_zero(base_folder: Path, color_rows: Path,
                                                             tmp_path: Path) -> None:
    config = deltaw.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])
    adapter = trained(base_folder, color_rows, tmp_path / "out", lora=config, freeze_a=True)
    assert adapter.sites["model.embed_tokens"].A.any()
    assert adapter.sites["model.embed_tokens"].B.any()


def test_what_is_frozen_is_not_among_the_parameters(tiny_llama: Callable[..., Any]) -> None:
    board = deltaw.attach(tiny_llama(), deltaw.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]), seed=0)
    tuning = LoraTuning(board, freeze_a=True)
    names = {name.removeprefix("model.") for name in tuning.parameters()}
    assert names == {"embed_tokens.lora_A", "embed_tokens.lora_B", "layers.0.self_attn.q_proj.lora_B",
                     "layers.1.self_attn.q_proj.lora_B"}
    assert all(p.requires_grad == (name in tuning.parameters()) for name, p in board.parameters("default").items())
