"""Layers that get one tensor are found by watching, and are then computed together with the same results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import deltaw
from deltaw import LoraConfig, Switchboard
from deltaw.core.layers import plain_layers
from deltaw.core.layers.shared_input import calls
from tests.device import DEVICE, randn
from tests.laws.cases import BY_NAME
from tests.laws.dense import fill

LLAMA = BY_NAME["llama"]


class Block(nn.Module):
    """Two projections of x, one of something else, and `twice`, which is called on x two times."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.other, self.twice = (nn.Linear(6, 6) for _ in range(4))
        self.skip = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x) * (1 if self.skip else self.second(x))
        return y + self.twice(self.other(y.tanh())) + self.twice(x)


def attached(model: nn.Module, **options: Any) -> Switchboard:
    config = LoraConfig(**{"r": 2, "target_modules": "all-linear", "init_lora_weights": False, **options})
    return deltaw.attach(model, config, "a", seed=0)


def gradients(board: Switchboard, x: Tensor, *, again: bool = False) -> dict[str, Tensor]:
    output = checkpoint(board.model, x, use_reentrant=False) if again else board.model(x)
    output.tanh().square().sum().backward()
    found = {name: p.grad for name, p in board.parameters("a").items() if p.grad is not None}
    board.model.zero_grad()
    return found


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        float((found[k] - expected[k]).abs().max()) <= 1e-5 * max(1.0, float(expected[k].abs().max())) for k in found)


@pytest.fixture
def block() -> Block:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Block().to(DEVICE)


def test_groups_of_a_llama_are_q_k_v_and_gate_up() -> None:
    model, batch = LLAMA.model(), LLAMA.batch()
    board = deltaw.attach(model, LLAMA.lora(), "a", seed=0)
    groups = board.share_inputs(lambda: model(*batch))
    ends = [tuple(site.rpartition(".")[2] for site in group) for group in groups]
    assert set(ends) == {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")}
    assert all(len({site.rpartition(".")[0] for site in group}) == 1 for group in groups)


@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
def test_results_are_those_of_layers_alone(block: Block, again: bool) -> None:
    board, x = attached(block), randn(5, 6)
    alone = gradients(board, x)
    assert board.share_inputs(lambda: block(x)) == [("first", "second")]
    assert close(gradients(board, x, again=again), alone)
    assert not calls.ready
    with torch.no_grad():
        assert torch.allclose(block(x), block(x.clone().requires_grad_()), atol=1e-6)


def test_it_is_one_node_for_the_group(block: Block) -> None:
    board, x = attached(block), randn(5, 6)

    def nodes() -> int:
        seen, todo = set(), [block(x).grad_fn]
        while todo:
            node: Any = todo.pop()
            if node is not None and node not in seen:
                seen.add(node)
                todo += [following for following, _ in node.next_functions]
        return sum("LowRankLinear" in node.name() for node in seen)

    assert nodes() == 5  # `twice` runs twice
    board.share_inputs(lambda: block(x))
    assert nodes() == 4


def test_a_layer_that_is_not_called_this_time_harms_nothing(block: Block) -> None:
    board, x = attached(block), randn(5, 6)
    board.share_inputs(lambda: block(x))
    block.skip = True
    skipped = gradients(board, x)
    other = Block().to(DEVICE)
    other.load_state_dict({k: v for k, v in block.state_dict().items() if "deltaw" not in k})
    other.skip = True
    board_2 = deltaw.attach(other, board.adapter("a"), "a", trainable=True)
    expected = {k: v for k, v in gradients(board_2, x).items() if not k.startswith("second")}
    assert close({k: v for k, v in skipped.items() if not k.startswith("second")}, expected)
    block.skip = other.skip = False
    assert close(gradients(board, x), gradients(board_2, x))


def test_a_hook_that_changes_one_layers_input_is_honoured(block: Block) -> None:
    board, x = attached(block), randn(5, 6)
    board.share_inputs(lambda: block(x))
    hook = block.second.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    shared = gradients(board, x)
    block.first.deltaw.followers = ()  # type: ignore[union-attr]
    assert close(shared, gradients(board, x))
    hook.remove()


def test_an_input_changed_in_place_between_the_layers_is_seen() -> None:
    class Changing(Block):
        def forward(self, x: Tensor) -> Tensor:
            x = x + 0
            y = self.first(x)
            with torch.no_grad():
                x.data.mul_(1)
                torch.Tensor.add_(x, 1)
            return y * self.second(x)

    model = Changing().to(DEVICE)
    board, x = attached(model), randn(5, 6)
    board.share_inputs(lambda: Block.forward(model, x))
    expected = model.first(x) * model.second(x + 1)
    assert torch.allclose(model(x), expected, atol=1e-5)


def test_switching_adapters_and_mixing_them(block: Block) -> None:
    board, x = attached(block), randn(5, 6)
    board.add("b", LoraConfig(r=3, target_modules=["second"]), seed=1)
    fill(board, "b", seed=4)
    board.share_inputs(lambda: block(x))
    for choice in ("b", "a", {"a": 0.5, "b": 2.0}, {"a": -1.0}, None):
        board.use(choice)
        with torch.no_grad():
            expected = block(x)
        assert torch.allclose(block(x), expected, atol=1e-5)
    board.use("a")
    with board.merged("b"):
        merged = block(x)
        with torch.no_grad():
            assert torch.allclose(merged, block(x), atol=1e-5)


def test_dropout_is_drawn_for_each_layer(block: Block) -> None:
    board, x = attached(block, lora_dropout=0.5), randn(5, 6)
    board.share_inputs(lambda: block.eval()(x))
    block.train()
    torch.manual_seed(0)
    first = block(x)
    torch.manual_seed(0)
    assert torch.equal(first, block(x))
    assert not torch.equal(first, block(x))
    block.eval()
    with torch.no_grad():
        expected = block(x)
    assert torch.allclose(block(x), expected, atol=1e-6)


def test_a_detached_model_has_nothing_left_of_it(block: Block) -> None:
    board, x = attached(block), randn(5, 6)
    before = nn.Module.state_dict(block)
    board.share_inputs(lambda: block(x))
    deltaw.detach(block)
    assert "deltaw" not in str(block)
    assert len(block.state_dict()) < len(before)
    block(x).sum().backward()


def traced(block: Block, board: Switchboard, x: Tensor) -> tuple[int, dict[str, Tensor]]:
    """How many products with a matrix a compiler sees in the forward, and the gradients."""
    seen: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        seen.extend(node for node in graph.graph.nodes if node.target is torch.nn.functional.linear)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    compiled(x).tanh().square().sum().backward()
    found = {name: p.grad for name, p in board.parameters("a").items() if p.grad is not None}
    block.zero_grad()
    return len(seen), found


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiler_sees_one_narrow_product_for_the_group(block: Block) -> None:
    board, x = attached(block), randn(5, 6)
    alone = gradients(board, x)
    count, found = traced(block, board, x)
    assert count == 10  # five calls of a layer, each with its narrow product
    assert close(found, alone)
    board.share_inputs(lambda: block(x))
    count, found = traced(block, board, x)
    assert count == 9
    assert close(found, alone)
    narrow: Any = block.first.deltaw.narrow  # type: ignore[union-attr]
    assert (narrow.x, narrow.parts) == (None, ())
    block.skip = True  # the group's last layer does not come
    expected = gradients(board, x)
    assert close(traced(block, board, x)[1], expected)
    block.skip = False
    assert close(traced(block, board, x)[1], alone)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiler_sees_plain_operations_where_the_group_is_not_alike(block: Block) -> None:
    board, x = attached(block), randn(5, 6)
    board.share_inputs(lambda: block(x))
    board.add("b", LoraConfig(r=3, target_modules=["second"], init_lora_weights=False), seed=1)
    for on in ("b", {"a": 1.0, "b": 0.5}):
        board.use(on)
        expected = block(x)
        assert torch.allclose(torch.compile(block, backend="eager")(x), expected, atol=1e-5)
        torch.compiler.reset()


def reasons(model: nn.Module, x: Tensor) -> dict[str, int]:
    return {reason: len(sites) for reason, sites in plain_layers(lambda: model(x)).items()}


def test_layers_that_are_not_fused_are_counted_by_reason(block: Block) -> None:
    board, x = attached(block), randn(5, 6)
    assert reasons(block, x) == {}
    block.first.weight.requires_grad_(True)
    assert reasons(block, x) == {"the base's weight or bias is trained too": 1}
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert reasons(block, x)["autocast"] == 4
    board.add("b", LoraConfig(r=3, target_modules=["other"]), seed=1)
    board.use({"a": 1.0, "b": 1.0})
    assert reasons(block, x)["2 adapters at once"] == 1
    board.use(None)
    assert reasons(block, x) == {}


@pytest.mark.parametrize("change", ["nothing", "trained weight", "autocast", "mixture"])
def test_what_is_counted_is_what_the_graph_shows(block: Block, change: str) -> None:
    """Each layer is one fused node or is counted."""
    board, x = attached(block), randn(5, 6, requires_grad=True)
    context = torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=change == "autocast")
    if change == "trained weight":
        block.other.weight.requires_grad_(True)
    if change == "mixture":
        board.add("b", LoraConfig(r=3, target_modules=["first", "second"]), seed=1)
        board.use({"a": 1.0, "b": 1.0})
    fused = 0
    with context:
        counted = {site for sites in plain_layers(lambda: block(x)).values() for site in sites}
        for name, layer in block.named_children():
            node = type(layer(randn(2, 6, requires_grad=True)).grad_fn).__name__
            fused += "LowRankLinear" in node
            assert ("LowRankLinear" in node) == (name not in counted), name
    assert fused == {"nothing": 4, "trained weight": 3, "autocast": 0, "mixture": 2}[change]
