"""`torch.compile` of an attached model gives the same, in every state of the switchboard."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import deltaw
from tests.laws.cases import BY_NAME, NORMAL, Case
from tests.laws.dense import error, fill

# torch's compiler warns of parts of torch; that it would warn of ours is what must not be ignored.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def check(case: Case, backend: str) -> None:
    model, batch = case.model(), case.batch()
    board = deltaw.attach(model, case.lora(), "a", seed=0)
    board.add("b", case.lora())
    fill(board, "a", seed=3)
    fill(board, "b", seed=4)
    compiled = torch.compile(model, backend=backend)
    tolerance = NORMAL[torch.float32]
    outputs = []
    for choice in ("a", {"a": 0.5, "b": 2.0}, "a"):
        board.use(choice)
        outputs.append(model(*batch))
        assert error(compiled(*batch), outputs[-1]) < tolerance
    assert error(outputs[1], outputs[0]) > 100 * tolerance
    if case.routable:
        with board.route(["b", "a", None, "a"]):
            assert error(compiled(*batch), model(*batch)) < tolerance
    with board.merged("b"):
        assert error(compiled(*batch), model(*batch)) < tolerance
    compiled(*batch).tanh().sum().backward()
    gradients = {key: p.grad for key, p in board.parameters("a").items()}
    model.zero_grad()
    model(*batch).tanh().sum().backward()
    for key, parameter in board.parameters("a").items():
        got = gradients[key]
        assert parameter.grad is not None
        assert got is not None
        assert float((got - parameter.grad).abs().max()) < 1e-4 * max(1.0, float(parameter.grad.abs().max())), key


@pytest.mark.parametrize("name", ["embedding_padded", "conv2d_grouped", "mha_both", "experts", "saved_head"])
def test_traced(name: str) -> None:
    check(BY_NAME[name], "aot_eager")


@pytest.mark.timeout(600)
def test_compiled_to_machine_code() -> None:
    check(BY_NAME["linear"], "inductor")
