"""The sites of a model are found by the types of its modules, never by their names."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deltaw.core import Adapter, Geometry, LoraConfig, SiteDelta
from deltaw.errors import BaseMismatchError, TargetError
from deltaw.inject import find_sites
from deltaw.switch import attach
from tests.laws import networks as net
from tests.laws.cases import BY_NAME

SHAPES = {
    "linear": {"0": Geometry(kind="linear", shape=(8, 6)), "2": Geometry(kind="linear", shape=(5, 8))},
    "conv1d_of_transformers": {"0": Geometry(kind="linear", shape=(6, 9), transposed=True)},
    "embedding_scaled": {"0": Geometry(kind="embedding", shape=(11, 6))},
    "conv2d_grouped": {"0": Geometry(kind="conv", shape=(9, 2, 3, 3), groups=3)},
    "mha_both": {"attention.in_proj": Geometry(kind="attention", shape=(24, 8)),
                 "attention.out_proj": Geometry(kind="attention", shape=(8, 8))},
    "mha_separate": {"attention.q_proj": Geometry(kind="attention", shape=(8, 8)),
                     "attention.k_proj": Geometry(kind="attention", shape=(8, 6)),
                     "attention.v_proj": Geometry(kind="attention", shape=(8, 4)),
                     "attention.out_proj": Geometry(kind="attention", shape=(8, 8))},
    "experts": {"out": Geometry(kind="linear", shape=(5, 6)), "experts.up": Geometry(kind="parameter", shape=(3, 7, 6)),
                "experts.down": Geometry(kind="parameter", shape=(3, 6, 7))},
    "experts_transposed": {"out": Geometry(kind="linear", shape=(5, 6)),
                           "experts.up": Geometry(kind="parameter", shape=(3, 6, 7), transposed=True),
                           "experts.down": Geometry(kind="parameter", shape=(3, 7, 6), transposed=True)},
    "parameter_of_root": {"matrix": Geometry(kind="parameter", shape=(5, 6))},
    "parameter_list": {f"matrices.{i}": Geometry(kind="parameter", shape=(6, 6)) for i in range(2)},
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", SHAPES)
def test_sites_and_geometries(name: str, device: str) -> None:
    found = find_sites(BY_NAME[name].model().to(device))
    assert {n: s.geometry for n, s in {**found.weights, **found.parameters}.items()} == SHAPES[name]


def test_what_cannot_be_adapted_is_no_site() -> None:
    class Odd(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids).tanh()

    model = nn.ModuleDict({"odd": Odd(4, 4), "up": nn.ConvTranspose1d(2, 2, 2), "norm": nn.LayerNorm(4),
                           "normed": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))})
    assert find_sites(model).weights == {}


def test_a_subclass_is_what_its_parent_is() -> None:
    class MyLinear(nn.Linear):
        """Another class of the same kind."""

    model = nn.Sequential(MyLinear(4, 3))
    assert find_sites(model).weights["0"].kind == "linear"


def test_a_base_with_a_part_of_our_name_is_refused() -> None:
    with pytest.raises(TargetError, match="'deltaw' of its own"):
        find_sites(nn.ModuleDict({"deltaw": nn.Linear(2, 2)}))


def test_parameters_of_a_list_belong_to_the_module_that_runs() -> None:
    sites = find_sites(nn.ModuleDict({"inside": net.ListOfMatrices()})).parameters
    assert {(s.host, s.parameter) for s in sites.values()} == {("inside", f"matrices.{i}") for i in range(2)}


def test_a_convolution_with_a_forward_of_its_own_is_changed_as_a_whole() -> None:
    model = nn.ModuleDict({"own": net.SelfPadding(3, 4, 3), "plain": nn.Conv2d(3, 4, 3)})
    sites = find_sites(model).weights
    assert {name: (site.kind, site.substituted) for name, site in sites.items()} == {
        "own": ("conv", True), "plain": ("conv", False)}
    board = attach(model, LoraConfig(target_modules=["plain"], r=1, lora_dropout=0.1))
    with pytest.raises(TargetError, match="'own' is changed as a whole"):
        board.add("other", LoraConfig(target_modules=["own"], r=1, lora_dropout=0.1))


def test_an_ungrouped_change_of_a_grouped_convolution_with_its_own_forward_is_refused() -> None:
    config = LoraConfig(target_modules=["own"], r=2)
    delta = SiteDelta(Geometry(kind="conv", shape=(4, 2, 3, 3), groups=2),
                      {"lora_A": torch.ones(2, 4, 3, 3), "lora_B": torch.ones(4, 1, 1, 1)})
    with pytest.raises(BaseMismatchError, match="forward of its own"):
        attach(nn.ModuleDict({"own": net.SelfPadding(4, 4, 3, groups=2)}), Adapter(config, {"own": delta}, {}))
