"""Laws of merging, undoing and detaching, for LoRA on every kind of layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltaw
from deltaw.core.layers import Adapted
from deltaw.errors import StateError
from tests.device import DEVICE
from tests.laws.cases import BY_NAME, NORMAL, Case, each_case, each_dtype
from tests.laws.dense import dense, error, fill, wide


def bits(tensor: Tensor) -> Tensor:
    """A tensor's bytes, so that -0.0 and 0.0 differ and NaN equals itself."""
    return tensor.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a module is: of each part its type, mode, own attributes and hooks, and the bits of its tensors."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[name] = (type(module), module.training, sorted(module.__dict__), sorted(module._modules),
                       len(module._forward_pre_hooks), "forward" in module.__dict__)
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                found[f"{name}.{leaf}"] = (id(parameter), parameter.requires_grad, bits(parameter).tolist())
    return found


@each_dtype
def test_merged_is_forward_and_unmerged_is_the_base(case: Case, dtype: torch.dtype) -> None:
    model, batch = case.model(dtype), case.batch(dtype)
    plain = copy.deepcopy(model)
    board = deltaw.attach(model, case.lora(), "a", seed=0)
    fill(board, "a", seed=3)
    before = snapshot(model)
    unmerged = model(*batch)
    board.merge("a")
    merged = model(*batch)
    assert error(merged, unmerged) < NORMAL[dtype]
    assert error(merged, dense(plain, [(board.adapter("a"), 1.0)])(*wide(batch))) < NORMAL[dtype]
    assert snapshot(model) != before
    with pytest.raises(StateError, match="merged"):
        board.merge("a")
    board.unmerge()
    assert snapshot(model) == before
    assert torch.equal(model(*batch), unmerged)
    with pytest.raises(StateError, match="nothing is merged"):
        board.unmerge()


@each_dtype
def test_detach_restores_the_module(case: Case, dtype: torch.dtype) -> None:
    model, batch = case.model(dtype), case.batch(dtype)
    frozen = next(model.parameters())
    frozen.requires_grad_(False)  # what was frozen before stays frozen after
    before, output = snapshot(model), model(*batch)
    board = deltaw.attach(model, case.lora(), "a", seed=0)
    board.add("b", case.lora())
    fill(board, "a", seed=3)
    assert snapshot(model) != before
    assert not torch.equal(model(*batch), output)
    board.merge("a")
    assert deltaw.detach(model) is model
    assert snapshot(model) == before
    assert torch.equal(model(*batch), output)
    assert not any(isinstance(module, Adapted) for module in model.modules())
    with pytest.raises(StateError, match="no switchboard"):
        deltaw.board(model)


@each_case
def test_merging_one_of_two_changes_no_output(case: Case) -> None:
    model, batch = case.model(), case.batch()
    board = deltaw.attach(model, case.lora(), "a", seed=0)
    board.add("b", case.lora())
    fill(board, "a", seed=3)
    fill(board, "b", seed=4)
    board.use({"a": 0.6, "b": 1.0})
    before, state = model(*batch), snapshot(model)
    if case.config.get("bias") or case.config.get("modules_to_save"):
        with pytest.raises(StateError, match="trained it in full"):
            board.merge("a")  # b's bias is a difference to the base's, which is not there while a is merged
        assert snapshot(model) == state
        board.merge()
    else:
        board.merge("a")
        assert board.active == {"b": 1.0}
    assert error(model(*batch), before) < NORMAL[torch.float32]
    board.unmerge()
    assert board.active == {"a": 0.6, "b": 1.0}
    assert torch.equal(model(*batch), before)


@each_case
def test_detach_with_merge_keeps_the_change(case: Case) -> None:
    model, batch = case.model(), case.batch()
    before = {name: type(module) for name, module in model.named_modules()}
    board = deltaw.attach(model, case.lora(), "a", seed=0)
    fill(board, "a", seed=3)
    output = model(*batch)
    deltaw.detach(model, merge="a")
    assert error(model(*batch), output) < NORMAL[torch.float32]
    assert {name: type(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize(("name", "dtype"), [
    ("linear", torch.float32), ("linear", torch.float16), ("tied_both", torch.bfloat16), ("experts", torch.bfloat16)])
def test_a_thousand_switches_leave_every_bit(name: str, dtype: torch.dtype) -> None:
    case = BY_NAME[name]
    model, batch = case.model(dtype), case.batch(dtype)
    board = deltaw.attach(model, case.lora(), "a", seed=0)
    board.add("b", case.lora())
    fill(board, "a", seed=3)
    fill(board, "b", seed=4)
    before, output = snapshot(model), model(*batch)
    subtracted = next(model.parameters()).detach().clone()
    delta = torch.full_like(subtracted, 0.1)
    for i in range(1000):
        with board.merged("ab"[i % 2]):
            pass
        subtracted.add_(delta).sub_(delta)
    assert snapshot(model) == before
    assert torch.equal(model(*batch), output)
    assert not torch.equal(subtracted, next(model.parameters()))  # what adding and subtracting would have done


def test_a_merge_that_is_not_finite_changes_nothing() -> None:
    case = BY_NAME["linear"]
    model = case.model(torch.float16)
    board = deltaw.attach(model, case.lora(), "a", seed=0)
    fill(board, "a", seed=3)
    before = snapshot(model)
    for value in (float("nan"), 1e4):  # 1e4² overflows float16
        with torch.no_grad():
            for parameter in board.parameters("a").values():
                parameter.fill_(value)
        state = snapshot(model)
        with pytest.raises(StateError, match="not finite"):
            board.merge("a")
        assert snapshot(model) == state
    fill(board, "a", seed=3)
    assert snapshot(model) == before


def test_a_merge_under_inference_mode_or_autocast_is_the_same() -> None:
    case = BY_NAME["mha_both"]
    model, batch = case.model(), case.batch()
    board = deltaw.attach(model, case.lora(), "a", seed=0)
    fill(board, "a", seed=3)
    board.merge("a")
    expected = {name: bits(p) for name, p in model.named_parameters()}
    board.unmerge()
    with torch.inference_mode(), torch.autocast(DEVICE.type, torch.bfloat16):
        board.merge("a")
    assert all(torch.equal(bits(p), expected[name]) for name, p in model.named_parameters())
    x, = batch
    model(x.requires_grad_()).sum().backward()
    assert x.grad is not None


def test_a_merged_model_that_moves_gets_its_own_tensors_back() -> None:
    case = BY_NAME["linear"]
    model = case.model()
    board = deltaw.attach(model, case.lora(), "a", seed=0)
    fill(board, "a", seed=3)
    before = snapshot(model)
    board.merge("a")
    model.to("cpu")
    model.load_state_dict(model.state_dict())
    board.unmerge()
    assert snapshot(model) == before
