"""The laws for adapters that start from the base's weights: PiSSA on every kind of layer, LoftQ over packed ones."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltaw
from deltaw import LoraConfig
from deltaw.bases.packed import Packed, pack, read_packed
from deltaw.errors import ConfigError, StateError
from tests.device import DEVICE, randn
from tests.laws.cases import CASES, NORMAL, Case
from tests.laws.dense import dense, error, wide
from tests.laws.test_undo import snapshot

INITS = ("pissa", "pissa_niter_4")
CHOSEN = [case for case in CASES if not case.config.get("modules_to_save") or case.config.get("target_modules")]
each = pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.name)


def start_config(case: Case, init: str = "pissa") -> LoraConfig:
    return case.lora(init_lora_weights=init)


def move(board: Any, name: str, seed: int = 3, size: float = 0.2) -> None:
    """Move an adapter's tensors away from where they started."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in board.parameters(name).values():
            parameter.add_((torch.randn(parameter.shape, generator=generator) * size).to(parameter))


@each
def test_pissa_starts_at_the_base_and_its_file_is_right_over_the_base(case: Case, tmp_path: Path) -> None:
    model, batch = case.model(), case.batch()
    plain, before, output = copy.deepcopy(model), snapshot(model), model(*batch)
    board = deltaw.attach(model, start_config(case), "a", seed=0)
    assert error(model(*batch), output) < NORMAL[torch.float32]
    assert all(bool(p.count_nonzero()) for key, p in board.parameters("a").items() if key.endswith("lora_A"))
    move(board, "a")
    changed = model(*batch)
    assert error(changed, output) > 1e-3
    value = board.adapter("a")
    assert error(changed, dense(plain, [(value, 1.0)])(*wide(batch))) < 3 * NORMAL[torch.float32]
    value.save(tmp_path / "a")
    other = case.model()
    deltaw.attach(other, deltaw.load(tmp_path / "a"), "a")
    assert error(other(*batch), changed) < 3 * NORMAL[torch.float32]
    with board.merged("a"):
        assert error(model(*batch), changed) < 3 * NORMAL[torch.float32]
    deltaw.detach(model)
    assert snapshot(model) == before


@each
def test_gradients_are_those_of_the_paper(case: Case) -> None:
    """Counting from B₀A₀ over W trains as the paper's W - s·B₀A₀ does: it is the same sum, so the same gradient."""
    model, batch = case.model(), case.batch()
    board = deltaw.attach(model, start_config(case), "a", seed=0)
    start = {key: p.detach().clone() for key, p in board.parameters("a").items()}
    move(board, "a")
    model(*batch).square().mean().backward()
    gradients = {key: p.grad for key, p in board.parameters("a").items()}
    assert all(g is not None and bool(g.count_nonzero()) for key, g in gradients.items() if "lora" in key)
    rest = case.model()
    plain = deltaw.attach(rest, case.lora(), "rest", seed=0)
    with torch.no_grad():
        for key, parameter in plain.parameters("rest").items():
            parameter.copy_(-start[key] if key.endswith("lora_B") else start[key] if "lora" in key else parameter)
    plain.add("a", case.lora())
    with torch.no_grad():
        moved = board.parameters("a")
        for key, parameter in plain.parameters("a").items():
            parameter.copy_(moved[key])
    if case.config.get("bias") or case.config.get("modules_to_save"):
        return  # two adapters would both count the bias
    plain.use({"rest": 1.0, "a": 1.0})
    rest(*batch).square().mean().backward()
    for key, parameter in plain.parameters("a").items():
        got = gradients[key]
        assert got is not None
        assert parameter.grad is not None
        assert error(got, parameter.grad) < 1e-3, key


@pytest.mark.parametrize("init", INITS)
def test_a_seed_gives_the_same_and_others_are_left_alone(init: str) -> None:
    case = next(case for case in CASES if case.name == "llama")
    boards = [deltaw.attach(case.model(), start_config(case, init), "a", seed=5) for _ in range(2)]
    first, second = (board.parameters("a") for board in boards)
    assert all(torch.equal(first[key], second[key]) for key in first)
    board, model, batch = boards[0], boards[0].model, case.batch()
    plain = case.model()(*batch)
    board.add("b", case.lora())
    move(board, "a")
    with board.route(["a", None, "b", "a"]):
        routed = model(*batch)
    assert error(routed[1:3], plain[1:3]) < NORMAL[torch.float32]
    board.use("a")
    assert error(routed[::3], model(*batch)[::3]) < NORMAL[torch.float32]
    board.use(None)
    assert torch.equal(model(*batch), plain)


# --------------------------------------------------------------------------------------------------- over packed layers

KINDS = ("nf4", "fp4", "int8")
PACKED = [("pissa", 1), ("loftq", 1), ("loftq", 4)]
quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:MatMul8bitLt:UserWarning")


def read(layer: Any) -> Packed:
    packed = read_packed(layer, layer.weight)
    assert packed is not None
    return packed


def values(layer: Any) -> Tensor:
    return read(layer).values().double()


@quiet
@pytest.mark.parametrize(("init", "iterations"), PACKED)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_starts_closer_to_the_original_and_undoes_itself(kind: str, init: str, iterations: int,
                                                                tmp_path: Path) -> None:
    from tests.laws.test_quantized import quantized

    model = quantized(kind, torch.float32)
    torch.manual_seed(0)
    original = {"0.weight": nn.Linear(64, 32).weight.detach()}
    W, x = original["0.weight"].to(DEVICE).double(), randn(4, 64)
    model(x)
    before, plain, hidden = snapshot(model), model(x), model[0](x)
    far = float((W - values(model[0])).norm())
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=init,
                        loftq_config={"loftq_iter": iterations} if init == "loftq" else {})
    with pytest.raises(ConfigError, match="original="):
        deltaw.attach(model, config, "a")
    assert snapshot(model) == before
    board = deltaw.attach(model, config, "a", original=original)
    parameters = board.parameters("a")

    def change() -> Tensor:
        return 2.0 * parameters["0.lora_B"].detach().double() @ parameters["0.lora_A"].detach().double()

    near = float((W - values(model[0]) - change()).norm())
    # A weight without structure has no principal part to speak of, so that PiSSA gains nothing sure; see below.
    assert near < (1.2 if init == "pissa" else 0.9) * far
    move(board, "a", size=0.05)
    expected = x.double() @ (values(model[0]) + change()).t() + model[0].bias.double()
    tolerance = 2e-2 if kind == "int8" else 2e-5  # int8 rounds its input too
    assert error(model[0](x), expected) < tolerance
    changed = model(x)
    with board.off():
        assert torch.equal(model(x), plain)
    board.use(None)
    assert torch.equal(model[0](x), hidden)
    board.use("a")
    assert torch.equal(model(x), changed)
    value = board.adapter("a")  # over the original weight
    start = W - values(model[0])
    assert value.sites["0"].rank == 8
    over_original = (W + value.delta("0").double()) - (values(model[0]) + change())
    assert float(over_original.norm()) < 1.01 * float(start.norm())
    board.merge("a", into="requantized", force=True)
    board.unmerge()
    assert torch.equal(model(x), changed)
    board.add("b", LoraConfig(r=2, target_modules=["0"]))
    for refused in (lambda: board.use({"a": 1.0, "b": 1.0}), lambda: board.use({"a": 0.5}),
                    lambda: board.route(["a", "b"]).__enter__()):
        with pytest.raises(StateError, match="packed weights of its own"):
            refused()
    assert torch.equal(model(x), changed)
    deltaw.detach(model)
    assert snapshot(model) == before
    assert torch.equal(model(x), plain)


@quiet
@pytest.mark.parametrize(("init", "iterations"), PACKED)
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_with_structure_loses_less_at_every_site(kind: str, init: str, iterations: int) -> None:
    from deltaw.core import Geometry
    from deltaw.core.methods import pissa
    from deltaw.core.methods.lora import delta_weight
    from tests.laws.test_quantized import quantized

    packing = read(quantized(kind, torch.float32)[0]).packing
    for seed in range(4):
        torch.manual_seed(seed)
        U, V = torch.linalg.qr(randn(32, 32)).Q, torch.linalg.qr(randn(64, 32)).Q
        W = U @ torch.diag(2.0 ** -torch.arange(32.0, device=DEVICE)) @ V.t()
        geometry = Geometry(kind="linear", shape=(32, 64))
        if init == "loftq":
            packed, A, B = pissa.loftq(W, geometry, 4, 2.0, lambda w: pack(w, packing), iterations=iterations)
        else:
            A, B = pissa.principal(W, geometry, 4, 2.0)
            packed = pack(W - delta_weight(A, B, 2.0, geometry), packing)
        near = float((W - packed.values() - 2.0 * B @ A).norm())
        assert near < (0.5 if init == "pissa" else 0.8) * float((W - pack(W, packing).values()).norm())


@quiet
def test_training_over_own_weights_leaves_both_bases_alone() -> None:
    from tests.laws.test_quantized import quantized

    model = quantized("nf4", torch.float32)
    torch.manual_seed(0)
    original = {"0.weight": nn.Linear(64, 32).weight.detach()}
    frozen, x = values(model[0]), randn(8, 64)
    board = deltaw.attach(model, LoraConfig(r=4, target_modules=["0"], init_lora_weights="loftq",
                                            loftq_config={"loftq_iter": 3}), "a", original=original)
    own = values(model[0])
    assert not torch.equal(own, frozen)
    optimizer = torch.optim.AdamW(board.parameters("a").values(), lr=0.01)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert torch.equal(values(model[0]), own)
    value, twin = board.adapter("a"), copy.deepcopy(model)
    expected = pack((own + 4 * board.parameters("a")["0.lora_B"].detach().double()
                     @ board.parameters("a")["0.lora_A"].detach().double()).float(), read(model[0]).packing).values()
    deltaw.detach(twin, merge="a", into="requantized", force=True)
    assert float((values(twin[0]) - expected).abs().max()) < 1e-6
    other = quantized("nf4", torch.float32)
    deltaw.attach(other, value, "a")  # over the base's own packed weights: its change counts from the original
    difference = (other[0](x) - model[0](x)).detach()
    assert float(difference.abs().max()) < 3 * float((x.double() @ (own - frozen).t()).abs().max())
    board.remove("a")
    assert torch.equal(values(model[0]), frozen)


def test_what_cannot_start_is_refused() -> None:
    with pytest.raises(ConfigError, match="Did you mean pissa"):
        LoraConfig(init_lora_weights="pisa")
    with pytest.raises(ConfigError, match="loftq_iter"):
        LoraConfig(init_lora_weights="loftq", loftq_config={"loftq_iter": 0})
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ConfigError, match="makes up for quantization"):
        deltaw.attach(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights="loftq"))
