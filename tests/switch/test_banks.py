"""Which adapters come to lie in a bank together, and that nobody else notices."""

from __future__ import annotations

import torch
from torch import nn

import deltaw
from deltaw.switch import Banks
from tests.device import DEVICE, randn


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(DEVICE)


def lora(**options: object) -> deltaw.LoraConfig:
    return deltaw.LoraConfig(**{"r": 2, "target_modules": ["0", "2"], **options})  # type: ignore[arg-type]


def rows_of(board: deltaw.Switchboard, name: str) -> list[int | None]:
    return [None if slot.place is None else slot.place.row for _, _, slot in board.slots(name)]  # type: ignore[union-attr]


def test_adapters_of_one_layout_share_a_bank_and_outputs_stay() -> None:
    model, x = network(), randn(3, 6)
    board = deltaw.attach(model, lora(), "a", seed=0)
    board.add("b", lora(), seed=1)
    board.add("wide", lora(r=3), seed=2)
    board.add("one", lora(target_modules=["2"]), seed=3)
    board.add("bias", lora(bias="lora_only"), seed=4)
    board.add("scale", lora(lora_alpha=9, lora_dropout=0.5), seed=5)
    for name in board.names:
        for parameter in board.parameters(name).values():
            torch.nn.init.normal_(parameter.data)
    before, live = {}, {name: board.parameters(name) for name in board.names}
    model.eval()
    for name in board.names:
        board.use(name)
        before[name] = model(x)
    banks = Banks(board)
    banks.hold(board.names)
    assert [rows_of(board, name) for name in ("a", "b", "scale")] == [[0, 0], [1, 1], [2, 2]]
    assert [rows_of(board, name) for name in ("wide", "one")] == [[0, 0], [0]]
    assert all(row is None for _, _, slot in board.slots("bias") for row in [getattr(slot, "place", None)])
    banks.hold(["b", "scale", "one"])
    assert [rows_of(board, name) for name in ("a", "b", "scale", "wide")] == [[None] * 2, [0, 0], [1, 1], [None] * 2]
    for name, output in before.items():
        board.use(name)
        assert torch.equal(model(x), output)
        assert all(p is live[name][tensor] for tensor, p in board.parameters(name).items())


def test_an_adapter_that_left_has_memory_of_its_own() -> None:
    board = deltaw.attach(network(), lora(), "a", seed=0)
    board.add("b", lora(), seed=1)
    banks = Banks(board)
    banks.hold(["a", "b"])
    parameter = next(iter(board.parameters("a").values()))
    assert parameter.untyped_storage().nbytes() > parameter.nbytes
    banks.hold(["b"])
    assert parameter.untyped_storage().nbytes() == parameter.nbytes


def test_what_starts_elsewhere_or_is_frozen_lies_in_none() -> None:
    board = deltaw.attach(network(), lora(init_lora_weights="pissa"), "pissa", seed=0)
    board.add("frozen", lora(), seed=1, trainable=False)
    Banks(board).hold(["pissa", "frozen"])
    assert rows_of(board, "pissa") == rows_of(board, "frozen") == [None, None]


def test_a_name_that_was_given_anew_is_another_adapter() -> None:
    board = deltaw.attach(network(), lora(), "a", seed=0)
    board.add("b", lora(), seed=1)
    banks = Banks(board)
    banks.hold(["a", "b"])
    board.remove("a")
    banks.hold(["b"])
    board.add("a", lora(), seed=2)
    banks.hold(["b", "a"])
    assert rows_of(board, "a") == [1, 1]
