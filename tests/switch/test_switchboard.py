"""The switchboard's own rules: names, what is on, routing, and that each call fits the state or is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import nn

import deltaw
from deltaw import LoraConfig, Switchboard
from deltaw.errors import ConfigError, RoutingError, StateError
from tests.device import DEVICE, randn
from tests.laws.dense import fill

X = torch.arange(24.0, device=DEVICE).reshape(4, 6) / 10
CONFIG = LoraConfig(r=2, target_modules=["0", "2"], bias="lora_only")


def two() -> Switchboard:
    """A board with adapters a (on) and b."""
    torch.manual_seed(0)
    board = deltaw.attach(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(DEVICE), CONFIG, "a")
    board.add("b", CONFIG)
    fill(board, "a", seed=3)
    fill(board, "b", seed=4)
    return board


@pytest.mark.parametrize("name", [
    "default", "lora", "lora_A", "a.b", "a/b", "../up", "50%", "%2E", "a:b", "bias:b", "weight:b", "schräg Δ", "deltaw",
    "weight", "bias", "forward", "training", "state", "slots", "host", "type", "None", " ", "base_layer", "x" * 300])
def test_any_name_will_do(name: str) -> None:
    board = two()
    model = board.model
    before = model(X)
    board.add(name, CONFIG)
    fill(board, name, seed=5)
    assert torch.equal(model(X), before)
    board.use(name)
    named = model(X)
    assert not torch.equal(named, before)
    parameters = {id(p) for other in board.names for p in board.parameters(other).values()}
    assert len(parameters) == 3 * len(board.parameters("a"))
    assert parameters <= {id(p) for p in model.parameters()}
    model.load_state_dict(model.state_dict())
    with board.route(["a", name, None, "b"]):
        assert torch.allclose(model(X)[1], named[1], atol=1e-6)
    board.remove(name)
    board.use("a")
    assert torch.equal(model(X), before)
    assert list(board.names) == ["a", "b"]


@pytest.mark.parametrize("name", ["", None, 3])
def test_what_is_no_name_is_refused(name: object) -> None:
    board = two()
    with pytest.raises(ConfigError, match="adapter name"):
        board.add(name, CONFIG)  # type: ignore[arg-type]


def test_names_that_are_not_attached_are_refused_with_near_ones() -> None:
    board = two()
    board.add("poet", CONFIG)
    calls: list[Callable[[], object]] = [
        lambda: board.use("peot"), lambda: board.use({"a": 1.0, "peot": 1.0}), lambda: board.remove("peot"),
        lambda: board.merge("peot"), lambda: board.parameters("peot"), lambda: board.adapter("peot"),
        lambda: board.table("peot"), lambda: board.route(["a", "peot"]).__enter__()]
    for call in calls:
        with pytest.raises(StateError, match="Did you mean poet"):
            call()
        assert board.active == {"a": 1.0}
    with pytest.raises(StateError, match="attached already"):
        board.add("a", CONFIG)


def test_use_off_and_route_put_back_what_was() -> None:
    board = two()
    model = board.model
    a, outputs = model(X), {}
    for name in ("b", None):
        board.use(name)
        outputs[name] = model(X)
    board.use("a")
    with contextlib.suppress(KeyboardInterrupt), board.off():
        assert torch.equal(model(X), outputs[None])
        raise KeyboardInterrupt
    assert torch.equal(model(X), a)
    with board.route(["b"] * 4):
        assert torch.equal(model(X), outputs["b"])
        with board.off():
            assert torch.equal(model(X), outputs[None])
        with board.route([None] * 4):
            assert torch.equal(model(X), outputs[None])
        assert torch.equal(model(X), outputs["b"])
    assert torch.equal(model(X), a)
    board.use({"a": 0.0})
    assert torch.allclose(model(X), outputs[None])


def test_mixes_are_linear_in_one_layer() -> None:
    torch.manual_seed(0)
    board = deltaw.attach(nn.Linear(6, 3).to(DEVICE), LoraConfig(r=2, target_modules=".*"), "a")
    board.add("b", LoraConfig(r=3, target_modules=".*"))
    fill(board, "a", seed=3)
    fill(board, "b", seed=4)
    outputs = {}
    for name in ("a", "b", None):
        board.use(name)
        outputs[name] = board.model(X)
    board.use({"a": 2.0, "b": -1.5})
    expected = outputs[None] + 2 * (outputs["a"] - outputs[None]) - 1.5 * (outputs["b"] - outputs[None])
    assert torch.allclose(board.model(X), expected, atol=1e-5)


@pytest.mark.parametrize("names", [["a", "b", "a"], ["a", "b"] * 4])
def test_rows_that_do_not_divide_are_refused(names: list[str]) -> None:
    board = two()
    with board.route(names), pytest.raises(RoutingError, match=f"4 rows.*{len(names)} rows"):
        board.model(X)


@pytest.mark.parametrize("names", ["a", [], ()])
def test_a_route_is_a_list_of_names(names: object) -> None:
    with pytest.raises(StateError, match="one name or None for each row"), two().route(names):  # type: ignore[arg-type]
        pass


def test_rows_may_be_repeated_or_flattened_with_tokens() -> None:
    board = two()
    model = board.model
    batch = randn(2, 3, 6)
    with board.route(["a", "b"]):
        expected = model(batch)
        assert torch.allclose(model(batch.flatten(0, 1)), expected.flatten(0, 1), atol=1e-6)
    beams = batch.repeat_interleave(2, 0)  # as `generate` repeats them
    with board.route(["a", "b"]):
        assert torch.allclose(model(beams), expected.repeat_interleave(2, 0), atol=1e-6)


def test_while_merged_nothing_else_may_switch() -> None:
    board = two()
    board.merge("a")
    assert (board.merged_mix, board.active) == ({"a": 1.0}, {})
    calls: list[Callable[[], object]] = [
        lambda: board.use("b"), lambda: board.use(None), lambda: board.merge("b"), lambda: board.remove("a"),
        lambda: board.off().__enter__(), lambda: board.route(["a"]).__enter__()]
    for call in calls:
        with pytest.raises(StateError, match="merged"):
            call()
    assert board.adapter("a").facts == {"base": board.fingerprint().to_dict()}
    board.unmerge()
    assert board.fingerprint() == two().fingerprint()


def test_a_routed_model_is_neither_merged_nor_robbed_of_its_adapters() -> None:
    board = two()
    board.add("c", CONFIG)
    with board.route(["a", "b", None, None]):
        with pytest.raises(StateError, match="routed"):
            board.merge("a")
        with pytest.raises(StateError, match="routed"):
            board.remove("b")
        board.remove("c")
    board.remove("b")


def test_what_is_removed_does_not_come_back() -> None:
    board = two()
    board.use({"a": 1.0, "b": 0.5})
    board.remove("b")
    assert board.active == {"a": 1.0}
    board.add("c", LoraConfig(r=1, target_modules=["0"]))
    board.use({"a": 1.0, "c": 0.5})
    board.merge("a")
    board.remove("c")
    board.unmerge()
    assert board.active == {"a": 1.0}
    board.remove("a")
    assert (board.names, board.active) == ((), {})
    with pytest.raises(StateError, match="nothing is on"):
        board.merge()


def test_merging_another_than_what_is_on_switches_and_unmerging_switches_back() -> None:
    board = two()
    a = board.model(X)
    board.use("b")
    b = board.model(X)
    with board.merged("a"):
        assert torch.allclose(board.model(X), a, atol=1e-5)
    assert torch.equal(board.model(X), b)


def test_stacked_factors_never_outlive_their_adapter() -> None:
    """A removed adapter's tensors may give their addresses to the next one of its name."""
    board = deltaw.attach(nn.Linear(64, 64).to(DEVICE), LoraConfig(r=4, target_modules=".*"), "a")
    board.add("b", LoraConfig(r=4, target_modules=".*"))
    fill(board, "a", seed=3)
    fill(board, "b", seed=4)
    values = [board.adapter("a"), board.adapter("b")]
    x = randn(2, 3, 64)
    with torch.no_grad():
        for i in range(40):
            board.remove("b")
            board.add("b", values[i % 2])
            board.use("b")
            expected = board.model(x)[1]
            with board.route(["a", "b"]):
                assert torch.allclose(board.model(x)[1], expected, atol=1e-4)


def test_stacked_factors_follow_their_adapter() -> None:
    board = deltaw.attach(nn.Linear(64, 64).to(DEVICE), LoraConfig(r=4, target_modules=".*"), "a")
    board.add("b", LoraConfig(r=4, target_modules=".*"))
    x = randn(2, 3, 64)
    board.use("b")
    with torch.no_grad():
        for seed in range(3):
            fill(board, "b", seed)
            for parameter in board.parameters("b").values():
                parameter.mul_(-1 if parameter.shape[0] == 64 else 1)  # as an optimizer's step, in place
            expected = board.model(x)[1]
            with board.route(["a", "b"]):
                assert torch.allclose(board.model(x)[1], expected, atol=1e-4)


def test_an_adapter_takes_the_mode_of_each_part_and_leaves_it() -> None:
    board = two()
    model = board.model.train()
    assert isinstance(model, nn.Sequential)
    model[0].eval()
    dropping = LoraConfig(r=2, target_modules=["0", "2"], lora_dropout=0.5, init_lora_weights=False)
    for name in ("c", "d"):
        board.add(name, dropping)
    for name in ("c", "d"):
        board.use(name)
        fill(board, name, seed=5)
        h = model[0](X)
        assert torch.equal(model[0](X), h)
        assert not torch.equal(model[2](h), model[2](h))
