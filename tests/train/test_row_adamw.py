"""AdamW by rows: torch's own numbers, whatever lies where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import nn

from deltaw.core.bank import Bank
from deltaw.train.optimizer import adamw, set_rate, take_step
from deltaw.train.row_adamw import RowAdamW, end_to_end, gradient_norm
from tests.device import DEVICE, randn

SHAPES = (((4, 9), (7, 4)), ((4, 5), (3, 4)))


def adapter() -> dict[str, nn.Parameter]:
    return {f"{site}.lora_{side}": nn.Parameter(randn(*shape)) for site, both in enumerate(SHAPES)
            for side, shape in zip("AB", both, strict=True)}


def bank_of(*adapters: Mapping[str, nn.Parameter]) -> Bank:
    return Bank([[(own[f"{site}.lora_A"], own[f"{site}.lora_B"]) for site in range(len(SHAPES))] for own in adapters])


def twin(own: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(p.detach().clone()) for name, p in own.items()}


def differentiate(bank: Bank, row: int, mine: Mapping[str, nn.Parameter], its: Mapping[str, nn.Parameter]) -> None:
    """The same gradients for both."""
    for place in bank.places[row]:
        place.add(*(randn(*factor.shape) for factor in place.factors))
    for name, p in mine.items():
        assert p.grad is not None
        its[name].grad = p.grad.clone()


def reference(its: Mapping[str, nn.Parameter], ratio: float = 1.0) -> torch.optim.AdamW:
    groups = [{"params": [p for n, p in its.items() if n.endswith("A")], "lr": 0.01, "rate_factor": 1.0},
              {"params": [p for n, p in its.items() if n.endswith("B")], "lr": 0.01 * ratio, "rate_factor": ratio}]
    return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1, fused=True)


def equal(mine: Mapping[str, nn.Parameter], its: Mapping[str, nn.Parameter]) -> None:
    for name, p in mine.items():
        torch.testing.assert_close(p, its[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("ratio", [1.0, 4.0])
@pytest.mark.parametrize("longest", [0.0, 0.5])
def test_rows_are_stepped_as_torch_steps_tensors(ratio: float, longest: float) -> None:
    adapters = [adapter(), adapter()]
    others = [twin(own) for own in adapters]
    bank = bank_of(*adapters)
    mine = [adamw(own, learning_rate=0.01, weight_decay=0.1, ratio_of_B=ratio) for own in adapters]
    its = [reference(own, ratio) for own in others]
    for step in range(1, 4):
        for row in (0, 1) if step != 2 else (1,):  # each row is at a step of its own
            differentiate(bank, row, adapters[row], others[row])
            optimizer, parameters = mine[row], list(adapters[row].values())
            assert isinstance(optimizer, RowAdamW)
            assert optimizer.rows() is not None
            norm = gradient_norm(optimizer, parameters)
            exact = sum(float(p.grad.double().square().sum()) for p in others[row].values()) ** 0.5
            assert float(norm) == pytest.approx(exact, rel=1e-7)
            take_step(optimizer, 0.01 / step, norm=norm, longest=longest)
            assert all(p.grad is None for p in parameters)
            if longest:
                torch.nn.utils.clip_grad_norm_(others[row].values(), longest)
            set_rate(its[row], 0.01 / step)
            its[row].step()
            equal(adapters[row], others[row])
    assert float(mine[0].state[adapters[0]["0.lora_A"]]["step"]) == 2
    assert all(float(values["step"]) == 3 for values in mine[1].state.values())


def test_a_step_with_a_gradient_missing_is_torchs_own_and_rows_follow() -> None:
    own = adapter()
    other, bank = twin(own), bank_of(own)
    mine, its = adamw(own, learning_rate=0.01, weight_decay=0.1), reference(other)
    for step in range(4):
        differentiate(bank, 0, own, other)
        if step == 1:
            own["1.lora_B"].grad = other["1.lora_B"].grad = None
        assert isinstance(mine, RowAdamW)
        assert (mine.rows() is None) == (step > 0)  # one tensor is a step behind for good
        mine.step()
        its.step()
        mine.zero_grad()
        equal(own, other)


def test_moments_that_were_put_back_are_gone_on_with() -> None:
    own = adapter()
    other, bank = twin(own), bank_of(own)
    mine, its = adamw(own, learning_rate=0.01, weight_decay=0.1), reference(other)
    for step in range(4):
        if step == 2:  # as a checkpoint does
            kept = {p: {key: value.clone() for key, value in values.items()} for p, values in mine.state.items()}
            mine.state.clear()
            mine.state.update(kept)
        differentiate(bank, 0, own, other)
        mine.step()
        its.step()
        mine.zero_grad()
        equal(own, other)


def test_parameters_that_move_to_another_bank_are_gone_on_with() -> None:
    own = adapter()
    other = twin(own)
    mine, its = adamw(own, learning_rate=0.01, weight_decay=0.1), reference(other)
    for _ in range(3):
        bank = bank_of(adapter(), own)
        differentiate(bank, 1, own, other)
        mine.step()
        its.step()
        mine.zero_grad()
        equal(own, other)


def test_what_does_not_lie_end_to_end_is_no_row() -> None:
    memory = torch.arange(12.0, device=DEVICE)
    a, b, c = memory[:4], memory[4:8].view(2, 2), memory[8:]
    row = end_to_end([a, b, c])
    assert row is not None
    assert torch.equal(row, memory)

    def lie(tensors: Sequence[torch.Tensor]) -> bool:
        return end_to_end(tensors) is not None

    assert lie([b, c])
    assert not lie([a, c])
    assert not lie([c, a])
    assert not lie([a, b.t()])
    assert not lie([a.clone(), b])


def test_no_gradient_is_no_length() -> None:
    own = adapter()
    assert float(gradient_norm(adamw(own, learning_rate=0.1), list(own.values()))) == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_long_gradients_are_measured_in_parts_and_as_exactly(dtype: torch.dtype) -> None:
    shapes = [(3, 7), (1 << 18,), (513, 1025), (2, 1 << 18)]
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    for p in parameters:
        p.grad = randn(*p.shape).to(dtype)
    parameters[2].grad = randn(1025, 513).to(dtype).t()  # not end to end
    exact = sum(float(p.grad.double().square().sum()) for p in parameters if p.grad is not None) ** 0.5
    assert float(gradient_norm(torch.optim.SGD(parameters), parameters)) == pytest.approx(exact, rel=1e-7)


def test_gradients_that_were_replaced_after_their_norm_are_seen() -> None:
    """The step after a norm takes rows as they were found; a look at their ends shows others."""
    own = adapter()
    other, bank = twin(own), bank_of(own)
    mine, its = adamw(own, learning_rate=0.01, weight_decay=0.1), reference(other)
    assert isinstance(mine, RowAdamW)
    for cleared in (False, True):
        differentiate(bank, 0, own, other)
        gradient_norm(mine, list(own.values()))
        if cleared:
            mine.zero_grad()
        for name, p in own.items():
            p.grad = randn(*p.shape)
            other[name].grad = p.grad.clone()
        mine.step()
        its.step()
        mine.zero_grad()
        equal(own, other)
