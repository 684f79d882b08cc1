"""save → load gives back every bit, for every kind of site; and PEFT's two files alone give back every ΔW."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import conv1d

from deltaw import store
from deltaw.core import Adapter, Geometry, LoraConfig, SiteDelta
from deltaw.errors import AdapterFileError
from tests.store.adapters import dense_grouped, factors, linear, one_of_each, small
from tests.store.equal import assert_same_adapter


def test_every_kind_of_site(tmp_path: Path) -> None:
    adapter = one_of_each()
    adapter.save(tmp_path / "a")
    assert_same_adapter(store.load(tmp_path / "a"), adapter)


def test_saving_what_was_loaded_writes_the_same_files(tmp_path: Path) -> None:
    one_of_each().save(tmp_path / "a")
    store.load(tmp_path / "a").save(tmp_path / "b")
    for name in ("adapter_config.json", "adapter_model.safetensors", "deltaw.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_files_alone_give_every_change(tmp_path: Path, rslora: bool) -> None:
    full = one_of_each()
    adapter = Adapter(LoraConfig.from_dict(full.config.to_dict() | {"use_rslora": rslora}), full.sites, full.facts)
    adapter.save(tmp_path)
    (tmp_path / "deltaw.json").unlink()
    alone = store.load(tmp_path)
    zeros = {"layers.1.attn.out_proj", "layers.2.attn.in_proj"}  # PEFT has always both
    assert set(alone.sites) == set(adapter.sites) | zeros
    assert not any(alone.delta(name).count_nonzero() for name in zeros)
    for name, site in adapter.sites.items():
        if not site.is_low_rank:
            assert all(torch.equal(value, site.tensors[key]) for key, value in alone.sites[name].tensors.items())
        elif name != "layers.0.dense":
            got, wanted = alone.delta(name), adapter.delta(name)
            got = got if alone.sites[name].geometry.transposed == site.geometry.transposed else got.mT
            torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-6)
    assert alone.scaling("layers.0.dense") == adapter.scaling("layers.0.dense")
    assert alone.facts["base_model"] == "some/base"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_dtypes_are_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = small().to(dtype)
    adapter.save(tmp_path / "a")
    loaded = store.load(tmp_path / "a")
    for name, site in adapter.sites.items():
        for tensor, value in site.tensors.items():
            got = loaded.sites[name].tensors[tensor]
            assert got.dtype == dtype
            assert torch.equal(got.float(), value.float())


def test_loaded_tensors_share_no_memory_and_want_no_gradient(tmp_path: Path) -> None:
    small().save(tmp_path)
    tensors = [t for site in store.load(tmp_path).sites.values() for t in site.tensors.values()]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)
    assert all(t.untyped_storage().nbytes() == t.nbytes and not t.requires_grad for t in tensors)


def test_parameters_views_and_shared_tensors_can_be_saved(tmp_path: Path) -> None:
    wide = torch.randn(4, 8)
    A = torch.nn.Parameter(wide[:2, ::2])
    geometry = Geometry(kind="linear", shape=(4, 4))
    adapter = Adapter(LoraConfig(r=2), {"a": SiteDelta(geometry, {"lora_A": A, "lora_B": A.t()}),
                                        "b": SiteDelta(geometry, {"lora_A": A, "lora_B": wide[:, 2:4]})})
    adapter.save(tmp_path)
    assert_same_adapter(store.load(tmp_path), adapter)


@pytest.mark.parametrize("name", ["", "x", "model.lora.layers.0.lora_A", "base_layer", "a.base_layer.b", "größe.層"])
def test_odd_module_names(tmp_path: Path, name: str) -> None:
    adapter = Adapter(LoraConfig(r=2), {name: linear()})
    adapter.save(tmp_path)
    assert_same_adapter(store.load(tmp_path), adapter)


def test_rank_one_and_a_rank_other_than_the_config(tmp_path: Path) -> None:
    adapter = Adapter(LoraConfig(r=8, lora_alpha=3), {"a": linear(rank=1), "b": linear(rank=3), "c": linear(rank=3)})
    adapter.save(tmp_path)
    options = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (options["r"], options["rank_pattern"], options["lora_alpha"]) == (3, {"^a": 1}, 3)
    assert_same_adapter(store.load(tmp_path), adapter)


def test_facts_and_task_are_in_pefts_config(tmp_path: Path) -> None:
    small(task_type="CAUSAL_LM").save(tmp_path)
    options = json.loads((tmp_path / "adapter_config.json").read_text())
    assert options["base_model_name_or_path"] == "a/b"
    assert (options["peft_type"], options["task_type"], options["inference_mode"]) == ("LORA", "CAUSAL_LM", True)
    assert (options["r"], options["lora_alpha"], options["target_modules"]) == (2, 3, ["q", "v"])


def test_an_alpha_changed_by_hand_counts(tmp_path: Path) -> None:
    adapter = one_of_each()
    adapter.save(tmp_path)
    path = tmp_path / "adapter_config.json"
    options = json.loads(path.read_text())
    doubled = {key: 2 * value for key, value in options["alpha_pattern"].items()}
    path.write_text(json.dumps(options | {"lora_alpha": 2 * options["lora_alpha"], "alpha_pattern": doubled}))
    changed = store.load(tmp_path)
    assert changed.facts == adapter.facts
    for name, site in adapter.sites.items():
        assert changed.sites[name].geometry == site.geometry
        if site.is_low_rank:
            assert changed.scaling(name) == pytest.approx(2 * adapter.scaling(name))


@pytest.mark.parametrize("rslora", [False, True])
def test_a_grouped_convolution_in_the_file_computes_the_same(tmp_path: Path, rslora: bool) -> None:
    """The file's A is a convolution over all channels, and its B one over groups, as PEFT runs them."""
    geometry = Geometry(kind="conv", shape=(6, 2, 3), groups=3)
    adapter = Adapter(LoraConfig(r=2, lora_alpha=5, use_rslora=rslora), {"conv": factors(geometry, 2)})
    adapter.save(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    options = json.loads((tmp_path / "adapter_config.json").read_text())
    x = torch.randn(2, 6, 9)
    h = conv1d(x, tensors["base_model.model.conv.lora_A.weight"])
    rank = options["r"] ** 0.5 if rslora else options["r"]
    got = conv1d(h, tensors["base_model.model.conv.lora_B.weight"], groups=3) * options["lora_alpha"] / rank
    torch.testing.assert_close(got, conv1d(x, adapter.delta("conv"), groups=3), atol=1e-5, rtol=1e-5)


def test_weights_of_another_form_under_our_record(tmp_path: Path) -> None:
    """Another program trained on: the zeros that stood for slices and groups are no longer zeros."""
    sites = {"qkv": linear(9, 4, 2, slices=((0, 3), (6, 9))), "conv": dense_grouped(),
             "grouped": factors(Geometry(kind="conv", shape=(6, 2, 3), groups=2), 2),
             "m.in_proj": factors(Geometry(kind="attention", shape=(12, 4)), 1),
             "m.out_proj": factors(Geometry(kind="attention", shape=(4, 4)), 2)}
    config = LoraConfig(r=2, target_modules=["qkv", "conv", "grouped", "m"], target_slices={"qkv": "q-v"})
    Adapter(config, sites).save(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {key: tensor + 0.25 for key, tensor in load_file(file).items()}
    save_file(tensors, file)
    changed = store.load(tmp_path)
    A, B = (tensors[f"base_model.model.qkv.lora_{x}.weight"] for x in "AB")
    torch.testing.assert_close(changed.delta("qkv"), B @ A * (config.lora_alpha / 2))
    A, B = (tensors[f"base_model.model.m.lora_{x}.weight"] for x in "AB")
    torch.testing.assert_close(changed.delta("m.in_proj"), B @ A * (config.lora_alpha / 2))
    grouped = changed.sites["grouped"]
    assert grouped.geometry.is_dense_grouped(grouped.A)
    assert changed.scaling("grouped") == config.lora_alpha / 2


def test_nothing_that_cannot_be_read_is_written(tmp_path: Path) -> None:
    adapter = small(1.0)
    adapter.sites["layers.0.q"].A[0, 0] = float("nan")
    adapter.sites["layers.0.q"].A[0, 1] = float("inf")
    with pytest.raises(AdapterFileError, match="holds 1 NaN and 1 infinite"):
        adapter.save(tmp_path / "a")
    with pytest.raises(AdapterFileError, match="no sites"):
        Adapter(LoraConfig(), {}).save(tmp_path / "a")
    wrong = SiteDelta(Geometry(kind="linear", shape=(6, 4)), {"lora_A": torch.ones(2, 4), "lora_B": torch.ones(6, 3)})
    with pytest.raises(AdapterFileError, match=r"site 'q': has factors of shapes \(2, 4\) and \(6, 3\)"):
        Adapter(LoraConfig(), {"q": wrong}).save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
