"""`attach` and `detach`: what they leave alone, what they refuse, and where they work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import deltaw
from deltaw import LoraConfig
from deltaw.errors import DeltawError, StateError, TargetError
from tests.device import DEVICE, randn
from tests.laws.dense import fill
from tests.laws.test_undo import snapshot


class Explorer(nn.Module):
    """A base whose own names look like an adapter's."""

    def __init__(self) -> None:
        super().__init__()
        self.explora_head, self.lora_A = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lora_A(self.explora_head(x))


def explorer() -> Explorer:
    return Explorer().to(DEVICE)


def test_a_base_with_lora_in_its_own_names() -> None:
    model = explorer()
    before, x = snapshot(model), randn(2, 4)
    output = model(x)
    board = deltaw.attach(model, LoraConfig(r=1, target_modules=["explora_head"]), "lora")
    fill(board, "lora", seed=1)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "explora_head.deltaw.weight:lora.lora_A", "explora_head.deltaw.weight:lora.lora_B"]
    assert not torch.equal(model(x), output)
    deltaw.detach(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("config", [
    {"target_modules": ["explora_haed"]}, {"target_modules": ["explora_head"], "rank_pattern": {"lora_B": 2}},
    {"modules_to_save": ["explora_haed"]}, {"target_parameters": ["explora_head.weights"]},
    {"target_modules": ["explora_head"], "layers_to_transform": [0]}])
def test_a_failed_attach_leaves_the_model_untouched(config: dict[str, Any]) -> None:
    model = explorer()
    before = snapshot(model)
    with pytest.raises(TargetError):
        deltaw.attach(model, LoraConfig(**config))
    assert snapshot(model) == before
    board = deltaw.attach(model, LoraConfig(target_modules=["explora_head"], r=2), "a")
    attached = snapshot(model)
    with pytest.raises(DeltawError):
        board.add("b", LoraConfig(**config))
    assert snapshot(model) == attached
    assert board.names == ("a",)


def test_attaching_twice_is_refused() -> None:
    model = explorer()
    board = deltaw.attach(model, LoraConfig(r=1))
    with pytest.raises(StateError, match=r"deltaw.board\(model\).add"):
        deltaw.attach(model, LoraConfig(r=1))
    assert deltaw.board(model) is board
    deltaw.detach(model)
    for call in (deltaw.board, deltaw.detach):
        with pytest.raises(StateError, match="no switchboard"):
            call(model)
    assert deltaw.attach(model, LoraConfig(r=1)) is not board


def test_the_base_keeps_its_names(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    parameters = [name for name, _ in model.named_parameters()]
    board = deltaw.attach(model, LoraConfig(r=2), "a")
    fill(board, "a", seed=1)
    state = model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in before.items())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == parameters
    assert len(state) == len(before) + len(board.parameters("a"))
    assert type(model).__name__ == "LlamaForCausalLM"


def test_rank_above_the_weight_warns_and_works() -> None:
    model = explorer()
    with pytest.warns(UserWarning, match=r"'explora_head' \(and 1 more sites\): rank 5 exceeds min\(in, out\) = 4"):
        board = deltaw.attach(model, LoraConfig(r=5, target_modules=["explora_head", "lora_A"]), "a")
    fill(board, "a", seed=1)
    x = randn(2, 4)
    output = model(x)
    board.merge()
    assert torch.allclose(model(x), output, atol=1e-5)


def test_meta_base_is_adapted_and_then_loaded() -> None:
    with torch.device("meta"):
        model = Explorer()
    board = deltaw.attach(model, LoraConfig(r=2, target_modules=["explora_head"]), "a")
    assert all(p.is_meta for p in model.parameters())
    assert model(torch.empty(2, 4, device="meta")).shape == (2, 3)
    with pytest.raises(StateError, match="meta"):
        board.merge("a")
    real = deltaw.attach(explorer(), LoraConfig(r=2, target_modules=["explora_head"]), "a")
    fill(real, "a", seed=1)
    board.add("b", real.adapter("a"), any_base=True)
    assert not any(p.is_meta for p in board.parameters("b").values())
    model.load_state_dict({k.replace(":a.", ":b."): t for k, t in real.model.state_dict().items()}, strict=False,
                          assign=True)
    board.use("b")
    x = randn(2, 4)
    assert torch.equal(model(x), real.model(x))


def test_low_memory_loading(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = tiny_llama()
    source.save_pretrained(tmp_path)
    ids = torch.arange(1, 9, device=DEVICE).reshape(2, 4)
    board = deltaw.attach(source, LoraConfig(r=2), "a")
    fill(board, "a", seed=1)
    for options in ({"low_cpu_mem_usage": True}, {"device_map": "cpu"}):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, **options).to(DEVICE)
        plain = model(ids).logits
        other = deltaw.attach(model, board.adapter("a"), "a")
        assert torch.allclose(model(ids).logits, source(ids).logits, atol=1e-6)
        assert not torch.allclose(model(ids).logits, plain, atol=1e-3)
        other.merge("a")
        deltaw.detach(model)
        assert torch.equal(model(ids).logits, plain)


def test_dtypes_are_explicit() -> None:
    model = explorer().to(torch.bfloat16)
    x = randn(2, 4, dtype=torch.bfloat16)
    board = deltaw.attach(model, LoraConfig(r=2, init_lora_weights=False, modules_to_save=["lora_A"],
                                            target_modules=["explora_head"]), "a")
    assert {p.dtype for k, p in board.parameters("a").items() if "explora" in k} == {torch.float32}
    board.add("b", board.adapter("a").to(torch.float16), dtype=None)
    assert {p.dtype for k, p in board.parameters("b").items() if "explora" in k} == {torch.float16}
    assert model(x).dtype == torch.bfloat16
    seen = []
    deltaw.detach(model)
    wide = deltaw.attach(model, LoraConfig(r=2, target_modules=["explora_head"]), "a", compute_dtype=torch.float32)
    fill(wide, "a", seed=1)
    seen.append(model(x))
    with wide.route(["a", None]):
        seen.append(model(x))
    assert [y.dtype for y in seen] == [torch.bfloat16] * 2


@pytest.mark.parametrize("routed", [False, True])
def test_autocast(routed: bool) -> None:
    model = explorer()
    board = deltaw.attach(model, LoraConfig(r=2), "a")
    fill(board, "a", seed=1)
    x = randn(2, 4)
    with board.route(["a", None] if routed else ["a", "a"]):
        expected = model(x)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            got = model(x)
            got.float().sum().backward()
    assert got.dtype == torch.bfloat16
    assert torch.allclose(got.float(), expected, atol=0.05 * float(expected.detach().abs().max()))
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in board.parameters("a").values())
