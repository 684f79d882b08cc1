"""PEFT's own folders read by us, and ours by PEFT: the same tensors and the same ΔW for every kind of weight."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from deltaw import store
from deltaw.core import Adapter, Geometry, LoraConfig, SiteDelta
from tests.store.equal import assert_same_adapter
from tests.store.peft_cases import CASES, Attention, Case, Convs, Fused, Layers, Mixture

pytestmark = pytest.mark.slow
EXPECTED_WARNINGS = (  # of PEFT, which we cannot help
    "LoRA adapter added to ConvNd layer with groups > 1", "fan_in_fan_out is set to", "Unauthenticated",
    "pattern keys did not match any targeted module",  # said of patterns for parameters, which it does use
)


def save_from_peft(case: Case, folder: Path) -> Any:
    model = case.peft_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return model


def load_in_peft(model: nn.Module, folder: Path) -> Any:
    """PEFT's model with a folder of ours; any warning, and any tensor missing or left over, fails."""
    from peft import PeftModel, get_peft_model_state_dict

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(model, folder)
    told = [str(w.message) for w in caught if not any(text in str(w.message) for text in EXPECTED_WARNINGS)]
    assert not told
    in_model, in_file = get_peft_model_state_dict(loaded), load_file(folder / "adapter_model.safetensors")
    with_biases = loaded.state_dict()
    for key, tensor in in_file.items():
        assert torch.equal(in_model[key] if key in in_model else with_biases[key], tensor), key
    assert {key for key in in_model if "lora_" in key} == {key for key in in_file if "lora_" in key}
    return loaded.eval()


def peft_deltas(model: Any) -> dict[str, Tensor]:
    """ΔW by the name that we give a site, from PEFT's own layers."""
    found = {}
    for name, layer in model.base_model.model.named_modules():
        if not hasattr(layer, "lora_A") or not hasattr(layer, "get_delta_weight"):
            continue
        plain = name.replace(".base_layer", "")
        if isinstance(layer.get_base_layer(), nn.MultiheadAttention):
            plain += ".in_proj"
        if getattr(layer, "parameter_name", None) not in (None, "weight") or type(layer).__name__ == "ParamWrapper":
            plain += f".{layer.parameter_name}"
        grouped = getattr(layer.get_base_layer(), "groups", 1) > 1
        twice = 2 if isinstance(layer.get_base_layer(), nn.Linear) and name.endswith("attn.base_layer.out_proj") else 1
        found[plain] = torch.empty(0) if grouped else layer.get_delta_weight("default").detach() * twice
    return found


def assert_same_deltas(adapter: Adapter, model: Any) -> None:
    deltas = peft_deltas(model)
    assert {name for name, site in adapter.sites.items() if site.is_low_rank} == set(deltas)
    for name, delta in deltas.items():
        if delta.numel():
            torch.testing.assert_close(adapter.delta(name), delta, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_peft_to_us_and_back(case: Case, tmp_path: Path) -> None:
    theirs = save_from_peft(case, tmp_path / "theirs")
    adapter = store.load(tmp_path / "theirs")
    assert_same_deltas(adapter, theirs)

    adapter.save(tmp_path / "ours")
    assert_same_adapter(store.load(tmp_path / "ours"), adapter)
    (tmp_path / "ours" / "deltaw.json").unlink()
    again = store.load(tmp_path / "ours")
    assert set(again.sites) == set(adapter.sites)
    ours = load_in_peft(case.model(), tmp_path / "ours")
    assert_same_deltas(adapter, ours)
    with torch.no_grad():
        torch.testing.assert_close(ours(case.x()), theirs(case.x()), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("case", [c for c in CASES if "bias" in c.name or "saved" in c.name], ids=lambda c: c.name)
def test_biases_and_saved_modules_have_the_values_of_training(case: Case, tmp_path: Path) -> None:
    model = save_from_peft(case, tmp_path)
    adapter = store.load(tmp_path)
    trained = {name.replace(".base_layer", "").replace("modules_to_save.default.", ""): p
               for name, p in model.base_model.model.named_parameters() if p.requires_grad and "lora_" not in name}
    found = {}
    for name, site in adapter.sites.items():
        if site.geometry.kind == "bias":
            found[name] = site.tensors["bias"]
        elif site.geometry.kind == "saved":
            found |= {f"{name}.{tensor}": value for tensor, value in site.tensors.items()}
    assert set(found) == set(trained)
    for name, value in found.items():
        assert torch.equal(value, trained[name]), name


def linear(out: int, inp: int, rank: int, **more: Any) -> SiteDelta:
    return site(Geometry(kind="linear", shape=(out, inp), **more), rank)


def site(geometry: Geometry, rank: int) -> SiteDelta:
    a, b = geometry.factor_shapes(rank)
    return SiteDelta(geometry, {"lora_A": torch.randn(a), "lora_B": torch.randn(b)})


def with_change(model: nn.Module, adapter: Adapter, weights: dict[str, str]) -> nn.Module:
    """The plain model with ΔW added to its weights: the reference for what PEFT should compute."""
    with torch.no_grad():
        for name in adapter.sites:
            model.get_parameter(weights.get(name, f"{name}.weight")).add_(adapter.delta(name))
    return model


def assert_peft_computes(adapter: Adapter, case: Case, folder: Path, weights: dict[str, str] | None = None) -> None:
    adapter.save(folder)
    assert_same_adapter(store.load(folder), adapter)
    wanted = with_change(case.model(), adapter, weights or {})
    with torch.no_grad():
        torch.testing.assert_close(load_in_peft(case.model(), folder)(case.x()), wanted(case.x()), atol=1e-5, rtol=1e-5)
    (folder / "deltaw.json").unlink()
    alone = store.load(folder)
    for name, known in adapter.sites.items():
        delta = alone.delta(name)  # PEFT's file has one fan_in_fan_out for all
        delta = delta if alone.sites[name].geometry.transposed == known.geometry.transposed else delta.t()
        torch.testing.assert_close(delta, adapter.delta(name), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("rslora", [False, True])
def test_slices_of_a_fused_projection(tmp_path: Path, rslora: bool) -> None:
    case = Case("", Fused)
    change = linear(8, 24, 3, transposed=True, slices=((0, 8), (16, 24)))
    geometry = Geometry(kind="linear", shape=(8, 24), transposed=True, slices=((0, 8), (16, 24)))
    change = site(geometry, 3)
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["c_attn", "out"], target_slices={"c_attn": "q-v"},
                        use_rslora=rslora, alpha_pattern={"out": 2})
    assert_peft_computes(Adapter(config, {"c_attn": change, "out": linear(4, 24, 3)}), case, tmp_path / "a")


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("n", "groups", "inputs"), [(1, 2, (2, 4, 7)), (2, 4, (2, 4, 7, 7)), (3, 2, (2, 4, 5, 5, 5))])
def test_one_A_for_all_groups_of_a_convolution(tmp_path: Path, n: int, groups: int, inputs: tuple[int, ...],
                                               rslora: bool) -> None:
    case = Case("", lambda: Convs(n, groups), inputs=inputs)
    geometry = Geometry(kind="conv", shape=tuple(case.model().third.weight.shape), groups=groups)
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["third"], use_rslora=rslora)
    assert_peft_computes(Adapter(config, {"third": site(geometry, 3)}), case, tmp_path / "a")


ATTENTION = {"attn.in_proj": "attn.in_proj_weight", "attn.out_proj": "attn.out_proj.weight"}
IN_PROJ = Geometry(kind="attention", shape=(24, 8))
OUT_PROJ = Geometry(kind="attention", shape=(8, 8))
Q_AND_V = Geometry(kind="attention", shape=(24, 8), slices=((0, 8), (16, 24)))
ONLY_K = Geometry(kind="attention", shape=(24, 8), slices=((8, 16),))


@pytest.mark.parametrize("sites", [
    {"attn.in_proj": (IN_PROJ, 3)},
    {"attn.out_proj": (OUT_PROJ, 3)},
    {"attn.in_proj": (IN_PROJ, 2), "attn.out_proj": (OUT_PROJ, 3)},
    {"attn.in_proj": (IN_PROJ, 4), "attn.out_proj": (OUT_PROJ, 3)},
    {"attn.in_proj": (Q_AND_V, 2), "attn.out_proj": (OUT_PROJ, 2)},
    {"attn.in_proj": (ONLY_K, 2)},
], ids=["in", "out", "ranks_2_3", "ranks_4_3", "slices", "one_slice"])
@pytest.mark.parametrize("rslora", [False, True])
def test_projections_of_an_attention(tmp_path: Path, sites: dict[str, tuple[Geometry, int]], rslora: bool) -> None:
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["attn"], use_rslora=rslora,
                        rank_pattern={name.split(".")[1]: rank for name, (_, rank) in sites.items()})
    adapter = Adapter(config, {name: site(geometry, rank) for name, (geometry, rank) in sites.items()})
    assert_peft_computes(adapter, Case("", Attention), tmp_path / "a", ATTENTION)


def test_all_linear_is_written_so_that_only_the_adapters_sites_match(tmp_path: Path) -> None:
    sites = {f"layers.{i}.{name}": linear(o, n, 2) for i in range(3) for name, o, n in (("up", 12, 8), ("down", 8, 12))}
    case = Case("", Layers, inputs=(2, 5), ids=True)
    assert_peft_computes(Adapter(LoraConfig(r=2), sites), case, tmp_path / "all")
    assert json.loads((tmp_path / "all" / "adapter_config.json").read_text())["target_modules"] == ["down", "up"]
    del sites["layers.1.up"]
    assert_peft_computes(Adapter(LoraConfig(r=2), sites | {"head.2": linear(4, 6, 2)}), case, tmp_path / "some")
    written = json.loads((tmp_path / "some" / "adapter_config.json").read_text())
    assert written["target_modules"] == ["down", "head.2", "layers.0.up", "layers.2.up"]


class InputsFirst(nn.Module):
    """Experts as (E, I, O), marked as transformers marks them."""

    is_transposed = True

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 8, 6) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,eio->...o", x, self.up)


def test_experts_stored_inputs_first(tmp_path: Path) -> None:
    change = site(Geometry(kind="parameter", shape=(3, 8, 6), transposed=True), 2)
    adapter = Adapter(LoraConfig(r=2, target_modules=[], target_parameters=["0.up"]), {"0.up": change})
    case = Case("", lambda: nn.Sequential(InputsFirst()))
    adapter.save(tmp_path)
    assert_same_adapter(store.load(tmp_path), adapter)
    wanted = with_change(case.model(), adapter, {"0.up": "0.up"})
    with torch.no_grad():
        torch.testing.assert_close(load_in_peft(case.model(), tmp_path)(case.x()), wanted(case.x()))
    (tmp_path / "deltaw.json").unlink()
    alone = store.load(tmp_path)  # what the files do not say is for the model to settle
    torch.testing.assert_close(alone.delta("0.up").mT, adapter.delta("0.up"))


def test_several_parameters_in_any_order_of_the_config(tmp_path: Path) -> None:
    case = Case("", Mixture, {"target_modules": [], "target_parameters": ["mlp.down", "mlp.router", "mlp.up"],
                              "rank_pattern": {"router": 1}})
    model = save_from_peft(case, tmp_path)
    adapter = store.load(tmp_path)
    assert adapter.facts["unsettled_parameters"].keys() == {"layers.0.mlp", "layers.1.mlp"}
    base = case.model()
    settled = store.settle_parameters(
        adapter, lambda module: [name for name, _ in base.get_submodule(module).named_parameters(recurse=False)])
    assert_same_deltas(settled, model)
    assert "unsettled_parameters" not in settled.facts


def test_what_peft_saves_over_our_folder_is_read(tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == "attention_and_linear")
    model = save_from_peft(case, tmp_path / "theirs")
    store.load(tmp_path / "theirs").save(tmp_path / "ours")
    loaded = load_in_peft(case.model(), tmp_path / "ours")
    with torch.no_grad():
        for name, parameter in loaded.named_parameters():
            if "lora_" in name:
                parameter.mul_(1.5)
    loaded.save_pretrained(tmp_path / "ours")
    assert (tmp_path / "ours" / "deltaw.json").exists()
    adapter = store.load(tmp_path / "ours")
    assert_same_deltas(adapter, loaded)
    assert not torch.equal(adapter.delta("out"), store.load(tmp_path / "theirs").delta("out"))
    assert model is not loaded


def test_transformers_reads_our_folder(tmp_path: Path, tiny_llama: Any) -> None:
    model = tiny_llama()
    targets = ("q_proj", "down_proj")
    sites = {name: linear(*module.weight.shape, 4) for name, module in model.named_modules() if name.endswith(targets)}
    adapter = Adapter(LoraConfig(r=4, lora_alpha=3, target_modules=targets, task_type="CAUSAL_LM"), sites)
    adapter.save(tmp_path / "a")
    ids = torch.tensor([[1, 5, 9, 2]])
    with torch.no_grad():
        wanted = with_change(tiny_llama(), adapter, {})(ids).logits
        model.load_adapter(str(tmp_path / "a"))
        torch.testing.assert_close(model(ids).logits, wanted, atol=1e-5, rtol=1e-5)


def test_an_adapted_embedding_of_transformers(tmp_path: Path, tiny_llama: Any) -> None:
    """PEFT stores the whole embedding beside its factors; what was stored is known by a digest."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    config = PeftConfig(target_modules=["embed_tokens", "lm_head"], r=2, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(tiny_llama(), config)
        model.save_pretrained(tmp_path)
    adapter = store.load(tmp_path)
    assert_same_deltas(adapter, model)
    assert set(adapter.facts["base_copies"]) == {"model.embed_tokens.weight", "lm_head.weight"}


def test_a_resized_vocabulary_is_a_saved_module(tmp_path: Path, tiny_llama: Any) -> None:
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(tiny_llama(), PeftConfig(target_modules=["q_proj"], r=2))
        model.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    adapter = store.load(tmp_path / "a")
    assert {name for name, s in adapter.sites.items() if not s.is_low_rank} == {"model.embed_tokens", "lm_head"}
    assert torch.equal(adapter.sites["lm_head"].tensors["weight"], tiny_llama().lm_head.weight)
