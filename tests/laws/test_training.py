"""Laws of training, for LoRA on every kind of layer: what gets gradients, what stays, and many at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import deltaw
from deltaw import Switchboard
from tests.laws.cases import BY_NAME, NORMAL, Case, each_case, each_routable
from tests.laws.dense import error, fill


def base_of(model: nn.Module, board: Switchboard) -> dict[str, Tensor]:
    """The base's parameters by name: all but the adapters'."""
    adapted = {id(p) for name in board.names for p in board.parameters(name).values()}
    return {name: p for name, p in model.named_parameters() if id(p) not in adapted}


def loss(case: Case, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """A sum over rows of something that is not linear in the output."""
    return model(*batch).movedim(case.row_dim, 0).flatten(1).tanh().square().sum(1).sum()


@each_case
def test_all_adapter_tensors_and_no_others_get_gradients(case: Case) -> None:
    model, batch = case.model().train(), case.batch()
    before = {name: (p.shape, p.detach().clone()) for name, p in model.named_parameters()}
    board = deltaw.attach(model, case.lora(), "a", seed=0)
    mine = board.parameters("a")
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in mine.values()}
    base = base_of(model, board)
    assert {name: p.shape for name, p in base.items()} == {name: shape for name, (shape, _) in before.items()}
    optimizer = torch.optim.AdamW(mine.values(), lr=0.05)
    start = {key: p.detach().clone() for key, p in mine.items()}
    losses = []
    for step in range(4):
        value = loss(case, model, batch)
        value.backward()
        losses.append(value.item())
        assert all(p.grad is None for p in base.values())
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in mine.values())
        if step:  # at the very start one of the factors is zero, and so is the other's gradient
            assert all(bool(p.grad.count_nonzero()) for k, p in mine.items() if p.grad is not None and k[-1] in "AB")
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    moved = {key for key, p in mine.items() if not torch.equal(p, start[key])}
    assert moved >= {key for key in mine if key.endswith(("lora_A", "lora_B"))}
    assert all(torch.equal(p, before[name][1]) for name, p in base.items())


@each_routable
def test_many_trained_in_one_batch_are_each_trained_alone(case: Case) -> None:
    model, batch = case.model(), case.batch()
    board = deltaw.attach(model, case.lora(), "a", seed=0)
    board.add("b", case.lora(r=1))
    fill(board, "a", seed=3)
    fill(board, "b", seed=4)
    names = ["b", "a", None, "a"]
    with board.route(names):
        loss(case, model, batch).backward()
    together = {name: {k: p.grad for k, p in board.parameters(name).items()} for name in "ab"}
    model.zero_grad()
    for name in "ab":
        rows = [i for i, used in enumerate(names) if used == name]
        board.use(name)
        loss(case, model, case.rows_of(batch, rows)).backward()
        for key, parameter in board.parameters(name).items():
            got = together[name][key]
            assert parameter.grad is not None, key
            assert got is not None, key
            scale = parameter.grad.abs().max()
            allowed = 10 * NORMAL[torch.float32] * max(float(scale), 1e-2)
            assert float((got - parameter.grad).abs().max()) <= allowed, key
        model.zero_grad()


@each_case
def test_another_adapter_coming_and_going_changes_nothing(case: Case) -> None:
    model, batch = case.model(), case.batch()
    board = deltaw.attach(model, case.lora(), "a", seed=0)
    fill(board, "a", seed=3)
    mine = board.parameters("a")
    optimizer = torch.optim.AdamW(mine.values(), lr=0.01)
    loss(case, model, batch).backward()
    optimizer.step()
    output = model(*batch)

    def facts() -> dict[str, object]:
        return {key: (id(p), p.requires_grad, p.tolist(), None if p.grad is None else p.grad.tolist(),
                      {k: v.tolist() for k, v in optimizer.state[p].items()})
                for key, p in board.parameters("a").items()}

    before = facts()
    value = board.adapter("a")
    board.add("b", case.lora(init_lora_weights=False))
    assert (facts(), board.active) == (before, {"a": 1.0})
    assert torch.equal(model(*batch), output)
    board.add("c", value)
    assert not any(p.requires_grad for p in board.parameters("c").values())
    board.use("c")
    assert error(model(*batch), output) < NORMAL[torch.float32]
    board.use({"b": 1.0, "c": 0.5})
    board.remove("b")
    board.remove("c")
    board.use("a")
    assert facts() == before
    assert torch.equal(model(*batch), output)


@each_case
def test_order_of_adding_is_irrelevant(case: Case) -> None:
    batch = case.batch()
    source = deltaw.attach(case.model(), case.lora(), "a", seed=0)
    source.add("b", case.lora(r=1))
    fill(source, "a", seed=3)
    fill(source, "b", seed=4)
    values = {name: source.adapter(name) for name in "ab"}
    outputs = []
    for order in ("ab", "ba"):
        model = case.model()
        board = deltaw.attach(model, values[order[0]], order[0])
        board.add(order[1], values[order[1]])
        for mix in ({"a": 1.0}, {"b": 1.0}):
            board.use(mix)
            outputs.append(model(*batch))
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])
    assert not torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_gradients_under_checkpointing_are_the_same(name: str, reentrant: bool) -> None:
    case = BY_NAME[name]
    gradients = []
    for checkpointing in (False, True):
        model, batch = case.model().train(), case.batch()
        if checkpointing:
            model.model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.model.enable_input_require_grads()
        board = deltaw.attach(model, case.lora(), "a", seed=0)
        board.add("b", case.lora())
        fill(board, "a", seed=3)
        fill(board, "b", seed=4)
        with board.route(["a", "b", "b", None]):
            loss(case, model, batch).backward()
        gradients.append({(n, k): p.grad for n in "ab" for k, p in board.parameters(n).items()})
    plain, recomputed = gradients
    for key, gradient in plain.items():
        assert gradient is not None, key
        assert recomputed[key] is not None, key
        assert bool(gradient.count_nonzero()), key
        assert float((gradient - recomputed[key]).abs().max()) < 1e-5 * max(1.0, float(gradient.abs().max())), key
