"""Different kinds of change at one module: one adapter's factors, another's full copy, a bias of a third."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deltaw
from deltaw import LoraConfig, Switchboard
from deltaw.errors import StateError
from tests.device import DEVICE
from tests.laws.dense import dense, error, fill

X = torch.arange(24.0, device=DEVICE).reshape(4, 6) / 10


def three() -> tuple[nn.Module, Switchboard]:
    """The plain model, and a board on its twin: `low` adapts the head, `full` trains it in full, `bias` its bias."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)).to(DEVICE)
    torch.manual_seed(0)
    twin = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)).to(DEVICE)
    board = deltaw.attach(twin, LoraConfig(r=2, target_modules=["1"]), "low")
    board.add("full", LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    board.add("bias", LoraConfig(r=1, target_modules=["1"], bias="lora_only"))
    for seed, name in enumerate(board.names):
        fill(board, name, seed)
    return plain, board


MIXES = [{"low": 1.0, "full": 1.0}, {"full": 0.5, "low": -1.0, "bias": 2.0}, {"bias": 1.0, "full": 1.0}, {"full": 1.0}]


@pytest.mark.parametrize("mix", MIXES)
def test_a_mix_is_the_sum_of_all(mix: dict[str, float]) -> None:
    plain, board = three()
    board.use(mix)
    expected = dense(plain, [(board.adapter(name), weight) for name, weight in mix.items()])(X.double())
    assert error(board.model(X), expected) < 1e-5
    board.merge()
    assert error(board.model(X), expected) < 1e-5
    board.unmerge()
    assert error(board.model(X), expected) < 1e-5


def test_rows_of_each_kind() -> None:
    _, board = three()
    names = ["full", "low", None, "bias"]
    with board.route(names):
        routed = board.model(X)
    for row, name in enumerate(names):
        board.use(name)
        assert error(routed[row], board.model(X)[row]) < 1e-5


def test_a_full_copy_cannot_stay_on_beside_what_is_merged_under_it() -> None:
    _, board = three()
    board.use({"low": 1.0, "full": 1.0})
    before = board.model(X)
    with pytest.raises(StateError, match="'full' trained it in full"):
        board.merge("low")
    assert torch.equal(board.model(X), before)


@pytest.mark.parametrize("order", [["low", "full", "bias"], ["full", "bias", "low"], ["bias", "low", "full"]])
def test_removed_in_any_order(order: list[str]) -> None:
    plain, board = three()
    for name in order:
        board.remove(name)
        for other in board.names:
            board.use(other)
            board.model(X)
    assert torch.equal(board.model(X), plain(X))
    deltaw.detach(board.model)
    assert torch.equal(board.model(X), plain(X))


def test_a_saved_copy_starts_as_the_base_whatever_is_attached() -> None:
    plain, board = three()
    board.add("late", LoraConfig(r=1, target_modules=["0"], modules_to_save=["1"]))
    board.use("late")
    assert torch.equal(board.model(X), plain(X))
    assert set(board.parameters("late")) == {"0.lora_A", "0.lora_B", "1.weight", "1.bias"}
