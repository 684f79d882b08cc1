"""From a config to sites: every pattern must match, what does not is named with near matches, all faults at once."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from deltaw import LoraConfig
from deltaw.core import Geometry
from deltaw.errors import TargetError
from deltaw.inject import find_sites, resolve


class Net(nn.Module):
    """Three layers with experts inside, an embedding, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.layers = nn.ModuleList([self.layer() for _ in range(3)])
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 9, bias=False)

    @staticmethod
    def layer() -> nn.ModuleDict:
        attention = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "v_proj": nn.Linear(4, 4), "qkv": nn.Linear(4, 12)})
        experts = nn.ModuleList([nn.ModuleDict({"w1": nn.Linear(4, 6)}) for _ in range(2)])
        return nn.ModuleDict({"attn": attention, "experts": experts, "norm": nn.LayerNorm(4)})


def names(model: nn.Module | None = None, **options: Any) -> list[str]:
    model = model or Net()
    return [t.site.name for t in resolve(LoraConfig(r=2, **options), model, find_sites(model))]


def faults(model: nn.Module | None = None, **options: Any) -> str:
    with pytest.raises(TargetError) as caught:
        names(model, **options)
    return str(caught.value)


@pytest.mark.parametrize(("options", "expected"), [
    ({"target_modules": ["q_proj"]}, [f"layers.{i}.attn.q_proj" for i in range(3)]),
    ({"target_modules": "head"}, ["head"]),
    ({"target_modules": ["1.attn.v_proj", "head"]}, ["layers.1.attn.v_proj", "head"]),
    ({"target_modules": ["head", "embed"]}, ["embed", "head"]),
    ({"target_modules": r"layers\.[02]\.attn\.(q|v)_proj"},
     [f"layers.{i}.attn.{p}_proj" for i in (0, 2) for p in "qv"]),
    ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj", "1.attn.q_proj"]},
     ["layers.0.attn.q_proj", "layers.2.attn.q_proj"]),
    ({"target_modules": ["q_proj"], "exclude_modules": r".*\.[01]\..*"}, ["layers.2.attn.q_proj"]),
    ({"target_modules": ["q_proj"], "layers_to_transform": [0]}, ["layers.0.attn.q_proj"]),
    ({"target_modules": ["q_proj"], "layers_to_transform": 0}, ["layers.0.attn.q_proj"]),
    ({"target_modules": ["w1"], "layers_to_transform": [1]}, ["layers.1.experts.0.w1", "layers.1.experts.1.w1"]),
    ({"target_modules": ["w1"], "layers_to_transform": [1], "layers_pattern": "experts"},
     [f"layers.{i}.experts.1.w1" for i in range(3)]),
    ({"target_modules": ["w1"], "layers_to_transform": [2], "layers_pattern": ["layers"]},
     ["layers.2.experts.0.w1", "layers.2.experts.1.w1"]),
    ({"target_modules": ["head"], "bias": "lora_only"}, ["head"]),
    ({"target_modules": ["0.attn.q_proj"], "bias": "lora_only"}, ["layers.0.attn.q_proj", "layers.0.attn.q_proj.bias"]),
    ({"target_modules": ["q_proj", "head"], "modules_to_save": ["head"], "layers_to_transform": [2]},
     ["layers.2.attn.q_proj", "head"]),
    ({"target_modules": [], "target_parameters": ["head.weight"]}, ["head"]),
    ({"target_modules": [], "modules_to_save": ["norm"]}, ["layers.0.norm", "layers.1.norm", "layers.2.norm", "norm"]),
])
def test_what_matches(options: dict[str, Any], expected: list[str]) -> None:
    assert names(**options) == expected


def test_all_linear_of_any_module() -> None:
    assert names() == [n for n, m in Net().named_modules() if isinstance(m, nn.Linear)]


@pytest.mark.parametrize(("fixture", "left_out"), [
    ("tiny_llama", {"lm_head"}), ("tiny_gpt2", {"lm_head"}), ("tiny_bert_classifier", {"classifier"})])
def test_all_linear_leaves_heads(fixture: str, left_out: set[str], request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(fixture)()
    sites = find_sites(model)
    linear = {name for name, site in sites.weights.items() if site.kind == "linear"}
    assert set(names(model)) == linear - left_out
    assert left_out < linear


def test_a_classifier_saves_its_head(tiny_bert_classifier: Callable[..., Any]) -> None:
    found = resolve(LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"), model := tiny_bert_classifier(),
                    find_sites(model))
    assert [t.site.name for t in found if t.site.kind == "saved"] == ["classifier"]
    assert len([t for t in found if t.site.kind == "linear"]) == 2


@pytest.mark.parametrize(("options", "said"), [
    ({"target_modules": ["q_porj"]}, "'q_porj' matches nothing.*Did you mean q_proj"),
    ({"target_modules": ["q_proj", "zzz"]}, "'zzz' matches nothing.*Names here look like embed"),
    ({"target_modules": ["proj"]}, "'proj' matches nothing"),  # a part of a name is no name
    ({"target_modules": ["norm"]}, "'norm' is a LayerNorm, which has no weight that can be adapted"),
    ({"target_modules": ["attn"]}, "'attn' is a ModuleDict"),
    ({"target_modules": r"layers\.\d\.q_proj"}, "matches no adaptable module"),
    ({"target_modules": "q_proj"}, "the regular expression 'q_proj'.*whole dotted name"),
    ({"target_modules": ["head"], "exclude_modules": ["q_porj"]}, "exclude_modules: 'q_porj'.*Did you mean q_proj"),
    ({"target_modules": ["head"], "exclude_modules": ["head"]}, "no site is left"),
    ({"target_modules": ["q_proj"], "layers_to_transform": [3, 0]}, r"layers_to_transform: got \[3\].*\[0, 1, 2\]"),
    ({"target_modules": ["head"], "rank_pattern": {"haed": 2}}, "rank_pattern.*Did you mean head"),
    ({"target_modules": ["head"], "alpha_pattern": {"q_proj": 2}}, "alpha_pattern.*matches none of the chosen"),
    ({"target_modules": ["head"], "target_slices": {"qkv": "q-v"}}, "target_slices.*matches none"),
    ({"target_modules": ["qkv"], "target_slices": {"qkv": "q-vvv"}}, "for 12 outputs"),
    ({"target_modules": ["qkv"], "target_slices": {"qkv": "---"}}, "one letter for each equal part"),
    ({"target_modules": ["qkv"], "target_slices": {"qkv": [(0, 4), (2, 6)]}}, r"rising ranges within 0\.\.12"),
    ({"target_modules": ["qkv"], "target_slices": {"qkv": [(0, 13)]}}, r"rising ranges within 0\.\.12"),
    ({"target_modules": ["qkv"], "target_slices": {"qkv": [(4, 4)]}}, r"rising ranges within 0\.\.12"),
    ({"target_modules": ["embed"], "target_slices": {"embed": "ab"}}, "a site of kind embedding"),
    ({"target_modules": [], "target_parameters": ["haed.weight"]}, "matches no 2-D or 3-D parameter"),
    ({"target_modules": ["head"], "modules_to_save": ["nrom"]}, "modules_to_save: 'nrom'.*Did you mean norm"),
])
def test_what_does_not_match_is_said(options: dict[str, Any], said: str) -> None:
    assert re.search(said, faults(**options), re.DOTALL)


def test_all_faults_at_once() -> None:
    text = faults(target_modules=["q_porj", "norm"], exclude_modules=["v_porj"], modules_to_save=["nrom"])
    assert text.startswith("4 faults:")
    assert all(f"'{word}'" in text for word in ("q_porj", "norm", "v_porj", "nrom"))


def test_dropout_needs_an_input() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "linear": nn.Linear(4, 4)})
    assert "lora_dropout" in faults(model, lora_dropout=0.1)
    assert names(model, lora_dropout=0.1, target_modules=["linear"]) == ["linear"]


def test_unsupported_modules_are_named() -> None:
    model = nn.ModuleDict({"up": nn.ConvTranspose1d(4, 4, 2), "line": nn.Linear(4, 4), "twice": nn.Bilinear(4, 4, 4)})
    nn.utils.parametrizations.weight_norm(model["line"])
    for name in model:
        assert f"'{name}' is a" in faults(model, target_modules=[name])
    assert names(model, target_modules=[], target_parameters=["twice.weight"]) == ["twice.weight"]


def test_patterns_set_rank_alpha_and_slices() -> None:
    model = Net()
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "qkv"],
                        rank_pattern={"1.attn.q_proj": 4, "q_proj": 3}, alpha_pattern={r"layers\.2\..*": 1},
                        target_slices={"0.attn.qkv": "-kv", "qkv": [[1, 3]]})
    found = {t.site.name: t for t in resolve(config, model, find_sites(model))}
    q = {i: found[f"layers.{i}.attn.q_proj"] for i in range(3)}
    assert [q[i].rank for i in range(3)] == [3, 4, 3]
    assert [q[i].scaling for i in range(3)] == [2.0, 1.5, 1 / 3]
    assert found["layers.0.attn.qkv"].site.geometry == Geometry(kind="linear", shape=(12, 4), slices=((4, 8), (8, 12)))
    assert found["layers.1.attn.qkv"].site.geometry.slices == ((1, 3),)


def test_a_shared_module_is_one_site() -> None:
    model = nn.Sequential(shared := nn.Linear(4, 4), nn.Tanh(), shared)
    assert names(model) == ["0"]


def test_the_config_is_not_changed_and_nothing_is_put_on_the_model() -> None:
    model = Net()
    before = [type(m) for m in model.modules()]
    targets = ["q_proj"]
    config = LoraConfig(r=2, target_modules=targets)
    described = config.to_dict()
    resolve(config, model, find_sites(model))
    assert (config.to_dict(), targets) == (described, ["q_proj"])
    assert [type(m) for m in model.modules()] == before
    assert not any(isinstance(v, torch.Tensor) for v in described.values())
