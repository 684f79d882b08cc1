"""LoRA-FA, which trains B alone: a plan's parts against the tensors of a real step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import deltaw
from deltaw.core import LoraConfig
from deltaw.plan import PlanConfig, plan
from deltaw.train.optimizer import adamw
from deltaw.train.tuning import LoraTuning


def test_lora_fa_has_gradients_and_moments_of_b_alone(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=4, target_modules=["embed_tokens", "q_proj", "down_proj"])
    config = PlanConfig(model=str(tmp_path / "base"), device="h100", dtype="fp32", batch_size=2, max_length=64,
                        lora=lora, methods=("lora",))
    whole, found = (plan(replace(config, freeze_a=freeze), search=False)["lora"] for freeze in (False, True))

    board = deltaw.attach(model, lora, name="plain", seed=0)
    parameters = LoraTuning(board, "plain", freeze_a=True).parameters()
    optimizer = adamw(parameters, learning_rate=1e-3)
    model(torch.zeros(2, 64, dtype=torch.long)).logits.sum().backward()
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    optimizer.step()
    moments = sum(t.nbytes for state in optimizer.state.values() for name, t in state.items() if name != "step")
    assert found.parameters == sum(p.numel() for p in parameters.values()) == sum(found.sites.values())
    parts = found.memory["train"].parts
    assert (parts["gradients"], parts["optimizer"]) == (gradients, moments)
    assert parts["adapters"] == sum(p.nbytes for p in board.parameters("plain").values()) + gradients  # and the best
    assert parts["activations"] < whole.memory["train"].parts["activations"]
    assert found.adapter_bytes == whole.adapter_bytes
    assert found.checkpoint_bytes == 2 * gradients + moments
    assert found.memory["merge"] == whole.memory["merge"]
