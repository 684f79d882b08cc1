"""An adapter as a value on a model: all tensors that do not fit are named in one error; another base is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltaw
from deltaw import Adapter, LoraConfig
from deltaw.core import Geometry, SiteDelta
from deltaw.errors import BaseMismatchError
from tests.device import DEVICE, randn
from tests.laws.cases import Case, each_case
from tests.laws.dense import fill


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3), nn.Linear(3, 2)).to(DEVICE)


def value(**options: Any) -> Adapter:
    usual = {"r": 2, "target_modules": ["0", "2"], "bias": "lora_only", "modules_to_save": ["3"]}
    config = LoraConfig(**usual | options)
    board = deltaw.attach(model(), config, "a")
    fill(board, "a", seed=1)
    return board.adapter("a")


def changed(adapter: Adapter, site: str, **tensors: Tensor) -> Adapter:
    """The adapter with other tensors at one site; a new site is called linear."""
    known = adapter.sites.get(site)
    geometry = known.geometry if known else Geometry(kind="linear", shape=(6, 6))
    return replace(adapter, sites={**adapter.sites, site: SiteDelta(geometry, tensors)})


@each_case
def test_a_value_brings_the_same_output_and_comes_back_the_same(case: Case) -> None:
    batch = case.batch()
    board = deltaw.attach(case.model(), case.lora(), "a", seed=0)
    fill(board, "a", seed=3)
    sent = board.adapter("a")
    other = case.model()
    received = deltaw.attach(other, sent, "x", trainable=True)
    assert torch.equal(other(*batch), board.model(*batch))
    assert all(p.requires_grad for p in received.parameters("x").values())
    back = received.adapter("x")
    assert list(back.sites) == list(sent.sites)
    for site, delta in sent.sites.items():
        assert back.sites[site].geometry == delta.geometry
        assert back.sites[site].tensors.keys() == delta.tensors.keys()
        assert all(torch.equal(t, back.sites[site].tensors[k]) for k, t in delta.tensors.items())
        assert all(t.data_ptr() != back.sites[site].tensors[k].data_ptr() for k, t in delta.tensors.items())


def test_all_that_does_not_fit_is_named_at_once() -> None:
    good = value()
    bad = changed(good, "0", lora_A=torch.zeros(2, 5), lora_B=torch.zeros(8, 2))
    bad = changed(bad, "0.bias", bias=torch.zeros(7))
    bad = changed(bad, "3", weight=torch.zeros(2, 4), wieght=torch.zeros(1))
    bad = changed(bad, "9.q_proj", lora_A=torch.zeros(2, 6), lora_B=torch.zeros(6, 2))
    bad = replace(bad, sites={name: site for name, site in bad.sites.items() if name != "2"})
    board = deltaw.attach(model(), good, "good")
    before = {k: t.clone() for k, t in board.model.state_dict().items()}
    with pytest.raises(BaseMismatchError) as caught:
        board.add("bad", bad)
    text = str(caught.value)
    for part in ("site '0': A (2, 5)", "'0.bias': a bias of shape (7,)", "'3.weight': has shape (2, 4)",
                 "'3.wieght': is not in this module", "Did you mean weight?", "'3.bias': is missing",
                 "site '9.q_proj': is not in this model", "site '2': has no tensors"):
        assert part in text
    assert len(caught.value.faults) == 7
    assert board.names == ("good",)
    assert board.model.state_dict().keys() == before.keys()
    with pytest.raises(BaseMismatchError):
        deltaw.attach(model(), bad)


@pytest.mark.parametrize("tensors", [
    {"lora_A": torch.zeros(2, 6)}, {"lora_A": torch.zeros(2, 6), "lora_B": torch.zeros(8, 3)},
    {"lora_A": torch.zeros(2), "lora_B": torch.zeros(8)}, {"lora_A": torch.zeros(0, 6), "lora_B": torch.zeros(8, 0)},
    {"lora_A": torch.zeros(()), "lora_B": torch.zeros(())}, {"bias": torch.zeros(8)},
    {"lora_A": torch.zeros(2, 6), "lora_B": torch.zeros(8, 2), "lora_magnitude_vector": torch.zeros(8)}])
def test_factors_that_are_no_pair_are_refused(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(BaseMismatchError, match="site '0'"):
        deltaw.attach(model(), changed(value(), "0", **tensors))


def test_slices_outside_the_weight_are_refused() -> None:
    sliced = value(target_modules=["0"], target_slices={"0": [(2, 4)]}, bias="none", modules_to_save=())
    site = sliced.sites["0"]
    outside = SiteDelta(replace(site.geometry, slices=((7, 9),)), site.tensors)
    assert deltaw.attach(model(), sliced).table("default")
    with pytest.raises(BaseMismatchError, match="site '0'"):
        deltaw.attach(model(), replace(sliced, sites={"0": outside}))


def test_partial_lets_sites_be_missing() -> None:
    whole = value()
    part = replace(whole, sites={name: site for name, site in whole.sites.items() if name != "2"})
    with pytest.raises(BaseMismatchError, match="partial=True"):
        deltaw.attach(model(), part)
    board = deltaw.attach(model(), part, partial=True)
    assert list(board.adapter("default").sites) == list(part.sites)


def test_another_base_is_refused_unless_asked_for() -> None:
    adapter = value()
    with pytest.raises(BaseMismatchError, match="other weights"):
        deltaw.attach(model(seed=1), adapter)
    board = deltaw.attach(model(seed=1), adapter, any_base=True)
    assert torch.equal(board.parameters("default")["0.lora_A"], adapter.sites["0"].A)
    with pytest.raises(BaseMismatchError, match="other weights"):
        board.add("again", adapter)
    rounded = model().to(torch.bfloat16)
    deltaw.attach(rounded, adapter)
    merged = deltaw.attach(model(), adapter, "a")
    merged.merge("a")
    merged.add("b", adapter)  # compared with the base's own weights, which are put aside now


def test_facts_travel_with_an_adapter() -> None:
    board = deltaw.attach(model(), value(), "a")
    board.note("a", trained="yes")
    assert board.adapter("a").facts["trained"] == "yes"
    board.add("b", board.adapter("a"))
    board.note("b", trained="no")
    assert board.adapter("a").facts["trained"] == "yes"


def test_a_value_from_elsewhere_comes_to_the_bases_device() -> None:
    here = value()
    sites = {name: replace(site, tensors={k: t.cpu() for k, t in site.tensors.items()})
             for name, site in here.sites.items()}
    board = deltaw.attach(model(), replace(here, sites=sites), "a")  # as a file's tensors, with a module among them
    board.add("b", here)
    assert {p.device for p in board.model.parameters()} == {DEVICE}
    x = randn(4, 6)
    expected = board.model(x)
    with board.route(["a", None, "a", "b"]):
        routed = board.model(x)
    assert torch.allclose(routed[::2], expected[::2], atol=1e-6)


def test_a_snapshot_is_a_copy() -> None:
    board = deltaw.attach(model(), value(), "a")
    taken = board.adapter("a")
    before = {name: {k: t.clone() for k, t in site.tensors.items()} for name, site in taken.sites.items()}
    fill(board, "a", seed=9)
    fill(deltaw.attach(model(), taken, "b"), "b", seed=9)
    assert all(torch.equal(t, before[name][k]) for name, site in taken.sites.items() for k, t in site.tensors.items())
    assert not torch.equal(board.adapter("a").sites["0"].A, before["0"]["lora_A"])


def test_a_head_that_was_trained_in_float32_runs_in_the_bases_dtype() -> None:
    network = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    deltaw.attach(network, LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]), "a", seed=0)
    value = deltaw.board(network).adapter("a")
    narrow = deltaw.detach(network).bfloat16()
    board = deltaw.attach(narrow, value, "a", any_base=True)
    assert narrow(torch.ones(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert board.parameters("a")["1.weight"].dtype == torch.bfloat16
