"""Jobs of a set that are no plain LoRA: starts from the weights, a frozen A, other parts of the network, compiling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import deltaw
from deltaw.errors import ConfigError
from deltaw.train import TrainMany, passes, train_many
from tests.train.many_sets import Make, config_maker, differences, together

SAME = 1e-6


@pytest.fixture
def make(base_folder: Path, color_rows: Path, tmp_path: Path) -> Make:
    return config_maker(base_folder, color_rows, tmp_path)


def with_a_neighbour(make: Make, tmp_path: Path, **options: Any) -> tuple[list[str], float]:
    """How a set of such a job and a plain one was computed, and how far the two are from runs alone."""
    own = {"max_steps": 6, **options}
    result = train_many([make("own", **own), make("plain", max_steps=6, seed=1, **_shared(own))], together(tmp_path),
                        quiet=True)
    assert {name: job.status for name, job in result.jobs.items()} == {"own": "finished", "plain": "finished"}, result
    worst = 0.0
    for name, config in (("own", own), ("plain", {"max_steps": 6, "seed": 1, **_shared(own)})):
        deltaw.train(make(name, "alone", **config), quiet=True)
        worst = max(worst, *differences(tmp_path / "alone" / name, tmp_path / "many" / name))
    return [line for line in result.lines if "passes of its own" in line], worst


def _shared(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in ("model", "quantize") if name in options}


@pytest.mark.parametrize("options", [
    {"freeze_a": True}, {"lora": deltaw.LoraConfig(r=4, init_lora_weights="pissa")},
    {"lora": deltaw.LoraConfig(r=4, init_lora_weights="gaussian", lora_dropout=0.3)}])
def test_a_frozen_a_and_pissa_share_passes(make: Make, tmp_path: Path, options: dict[str, Any]) -> None:
    apart, worst = with_a_neighbour(make, tmp_path, **options)
    assert apart == []
    assert worst <= SAME


@pytest.mark.parametrize("options", [
    {"lora": deltaw.LoraConfig(r=4, modules_to_save=["lm_head"])},
    {"lora": deltaw.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"])}])
def test_other_parts_of_the_network(make: Make, tmp_path: Path, options: dict[str, Any]) -> None:
    _, worst = with_a_neighbour(make, tmp_path, **options)
    assert worst <= SAME


def test_compiling_is_refused_by_job_and_auto_leaves_it_off(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        train_many([make("a", compile="auto"), make("b", compile="on")], together(tmp_path), quiet=True)
    assert [str(fault) for fault in caught.value.faults] == [
        "job 'b': compile: got 'on'; expected auto or off. Layers are not compiled while adapters train together"]
    full = deltaw.TrainConfig.from_dict({**make("b").to_dict(), "method": "full", "lora": {}})
    with pytest.raises(ConfigError, match=r"job 'b': method: got 'full'; expected lora"):
        train_many([make("a"), full], together(tmp_path), quiet=True)


@pytest.mark.slow
@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_starts_over_packed_weights_have_passes_of_their_own(init: str, color_rows: Path, tmp_path: Path,
                                                             tokenizer: Any) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "base"
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                                 num_attention_heads=2, num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
                                 pad_token_id=0)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    apart, worst = with_a_neighbour(config_maker(folder, color_rows, tmp_path), tmp_path, quantize="nf4",
                                    lora=deltaw.LoraConfig(r=4, init_lora_weights=init))
    assert len(apart) == 1
    assert "job 'own' has passes of its own" in apart[0]
    assert "packed weights of its own" in apart[0]
    assert worst <= 1e-5


@pytest.mark.slow
def test_in_bf16_rounding_tells_a_set_from_runs_alone(make: Make, tmp_path: Path) -> None:
    """2e-2 for losses and tensors after six steps: eight bits of mantissa, and AdamW steps of one length at first."""
    result = train_many([make(n, dtype="bf16", max_steps=6, seed=seed) for seed, n in enumerate("ab")],
                        together(tmp_path), quiet=True)
    assert not [line for line in result.lines if "passes of its own" in line]
    for seed, name in enumerate("ab"):
        deltaw.train(make(name, "alone", dtype="bf16", max_steps=6, seed=seed), quiet=True)
        assert max(differences(tmp_path / "alone" / name, tmp_path / "many" / name)) <= 2e-2


def test_a_shared_pass_keeps_what_was_counted(make: Make, tmp_path: Path) -> None:
    """The bound on memory: bytes that a token keeps, counted for one job, times the tokens of all in the pass."""
    kept: dict[int, int] = {}
    alive: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            alive.append(tensor)  # so that no address is given out twice
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with TrainMany([make("a", lora=deltaw.LoraConfig(r=4)), make("b", lora=deltaw.LoraConfig(r=2), batch_size=5)],
                   together(tmp_path), quiet=True) as many:
        chosen = list(many.running())
        tokens = sum(job.draw().tokens for job in chosen)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            passes.gradients(many.board, chosen, many.scheduler.budget, many._failing)
        assert sum(kept.values()) == pytest.approx(tokens * many.bytes_per_token, rel=0.2)


def test_a_start_that_is_impossible_names_the_job(make: Make, tmp_path: Path) -> None:
    """LoftQ makes up for quantization, and this base is not quantized."""
    with pytest.raises(ConfigError, match=r"job 'b'.*LoftQ makes up for quantization"):
        train_many([make("a"), make("b", lora=deltaw.LoraConfig(r=4, init_lora_weights="loftq"))], together(tmp_path),
                   quiet=True)
