"""What `load` accepts and refuses: PEFT's options, folders within folders, pickles, the Hub."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from deltaw import store
from deltaw.core import Adapter, Geometry, LoraConfig
from deltaw.errors import AdapterFileError
from tests.store.adapters import factors, linear, small
from tests.store.equal import assert_same_adapter

MINIMAL = {"peft_type": "LORA", "target_modules": ["q", "v"]}


def peft_folder(path: Path, options: dict[str, Any], adapter: Adapter | None = None) -> Path:
    """A folder as PEFT leaves it, with this config."""
    (adapter or small(r=8)).save(path)
    (path / "deltaw.json").unlink()
    (path / "adapter_config.json").write_text(json.dumps(options))
    return path


def test_pefts_defaults_for_absent_options(tmp_path: Path) -> None:
    config = store.load(peft_folder(tmp_path, MINIMAL)).config
    assert config == LoraConfig(r=8, lora_alpha=8, target_modules=["q", "v"])


def test_every_option_that_both_have(tmp_path: Path) -> None:
    options = MINIMAL | {
        "r": 8, "lora_alpha": 3.5, "lora_dropout": 0.1, "target_modules": r".*\.(q|v)", "exclude_modules": ["x"],
        "layers_to_transform": None, "rank_pattern": {"z": 3}, "alpha_pattern": {"z": 4}, "use_rslora": True,
        "bias": "lora_only", "modules_to_save": ["classifier", "score"], "init_lora_weights": "gaussian",
        "task_type": "SEQ_CLS", "base_model_name_or_path": "a/b", "revision": "v1", "target_parameters": ["e.up"]}
    adapter = store.load(peft_folder(tmp_path, options))
    assert adapter.config == LoraConfig(
        r=8, lora_alpha=3.5, lora_dropout=0.1, target_modules=r".*\.(q|v)", exclude_modules=["x"], use_rslora=True,
        rank_pattern={"z": 3}, alpha_pattern={"z": 4}, bias="lora_only", modules_to_save=["classifier", "score"],
        init_lora_weights="gaussian", task_type="SEQ_CLS", target_parameters=["e.up"])
    assert adapter.facts == {"base_model": "a/b", "revision": "v1"}


@pytest.mark.parametrize(("options", "field", "value"), [
    ({"layers_to_transform": 0}, "layers_to_transform", (0,)), ({"r": None}, "r", 8),
    ({"layers_to_transform": [0, 1]}, "layers_to_transform", (0, 1)), ({"rank_pattern": None}, "rank_pattern", {}),
    ({"layers_pattern": "layers"}, "layers_pattern", ("layers",)),
    ({"target_modules": "ALL-linear"}, "target_modules", "all-linear"),
    ({"init_lora_weights": "eva"}, "init_lora_weights", True),
    ({"bias": None}, "bias", "none"), ({"modules_to_save": None}, "modules_to_save", ()),
])
def test_pefts_ways_to_say_it(tmp_path: Path, options: dict[str, Any], field: str, value: object) -> None:
    assert getattr(store.load(peft_folder(tmp_path, MINIMAL | options)).config, field) == value


@pytest.mark.parametrize("options", [
    {"use_dora": False, "lora_bias": False, "layer_replication": None, "trainable_token_indices": []},
    {"megatron_core": "megatron.core", "qalora_group_size": 16, "runtime_config": {"ephemeral_gpu_offload": False}},
    {"eva_config": {"rho": 2}, "velora_config": {}, "auto_mapping": {"base_model_class": "X"}},
    {"peft_version": "0.21.2", "inference_mode": False},
    {"an_option_of_tomorrow": None, "another": False, "third": 0, "fourth": {}},
])
def test_options_that_are_off_or_without_effect_are_accepted(tmp_path: Path, options: dict[str, Any]) -> None:
    assert store.load(peft_folder(tmp_path, MINIMAL | options)).config.r == 8


@pytest.mark.parametrize(("options", "reason"), [
    ({"peft_type": "IA3"}, "method IA3; expected LORA"), ({"peft_type": None}, "has no method"),
    ({"use_dora": True}, "use_dora: asks for DoRA, which is not supported yet"),
    ({"lora_bias": True}, "bias in lora_B"), ({"trainable_token_indices": [1]}, "trained tokens"),
    ({"layer_replication": [[0, 2]]}, "replicated layers"), ({"alora_invocation_tokens": [1]}, "activated LoRA"),
    ({"init_lora_weights": "pissa_niter_4"}, "changes the base's own weights"),
    ({"init_lora_weights": "loftq"}, "changes the base's own weights"),
    ({"lora_alhpa": 3}, "unknown option, set to 3; expected options of PEFT's LoRA. Did you mean lora_alpha"),
    ({"r": 0}, "r: got 0"), ({"r": "8"}, "r: is '8'; expected a whole number"), ({"r": True}, "a whole number"),
    ({"lora_alpha": -1}, "lora_alpha: got -1"), ({"lora_alpha": float("nan")}, "lora_alpha: is nan"),
    ({"lora_alpha": 10**400}, "a number"), ({"bias": "some"}, 'bias: got \'some\'; expected "none"'),
    ({"target_modules": None}, "at least one target"), ({"target_modules": {"q": 1}}, "target_modules: is"),
    ({"target_modules": "(q"}, "target_modules: has the pattern '(q'"),
    ({"rank_pattern": {"(?i)q": 2}}, "does not parse"), ({"rank_pattern": {"q{9999999999}": 2}}, "does not parse"),
    ({"rank_pattern": {"q": "4"}}, "a rank for each pattern"),
    ({"alpha_pattern": ["q"]}, "a number for each pattern"), ({"layers_to_transform": ["0"]}, "layer indices"),
])
def test_options_that_cannot_be_followed_are_refused(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    folder = peft_folder(tmp_path, MINIMAL | options)
    with pytest.raises(AdapterFileError) as caught:
        store.load(folder)
    assert reason in str(caught.value)
    assert "adapter_config.json" in str(caught.value)


def test_all_options_at_fault_are_listed(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path, MINIMAL | {"use_dora": True, "r": "x", "new": 1, "lora_bias": True})
    with pytest.raises(AdapterFileError) as caught:
        store.load(folder)
    assert len(caught.value.faults) == 4


def test_patterns_of_an_attention_are_its_modules(tmp_path: Path) -> None:
    sites = {f"a.attn.{name}": factors(Geometry(kind="attention", shape=shape), 3)
             for name, shape in (("in_proj", (12, 4)), ("out_proj", (4, 4)))}
    options = {"r": 8, "lora_alpha": 2, "target_modules": ["attn"], "peft_version": "0.30.0",
               "rank_pattern": {"attn": 3}, "alpha_pattern": {"a.attn": 6, "out_proj": 100}}
    adapter = store.load(peft_folder(tmp_path, options, Adapter(LoraConfig(r=3, target_modules=["attn"]), sites)))
    for name in sites:
        assert (adapter.config.rank_at(name), adapter.scaling(name)) == (3, 2.0)


@pytest.mark.parametrize(("version", "times"), [("0.30.0", 0.5), ("0.21.3", 0.5), ("0.21.2", 1), (None, 1), ("x", 1)])
def test_pefts_out_proj_counts_twice_until_it_was_mended(tmp_path: Path, version: str | None, times: float) -> None:
    sites = {"m.in_proj": factors(Geometry(kind="attention", shape=(12, 4)), 2),
             "m.out_proj": factors(Geometry(kind="attention", shape=(4, 4)), 2)}
    adapter = Adapter(LoraConfig(r=2, target_modules=["m"]), sites)
    adapter.save(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_version": version}))
    for _ in range(2):
        loaded = store.load(tmp_path)
        torch.testing.assert_close(loaded.delta("m.in_proj"), adapter.delta("m.in_proj"))
        torch.testing.assert_close(loaded.delta("m.out_proj"), times * adapter.delta("m.out_proj"))
        (tmp_path / "deltaw.json").unlink(missing_ok=True)


def test_keys_without_the_prefix_and_of_compiled_models(tmp_path: Path) -> None:
    adapter = small(r=8)
    peft_folder(tmp_path, MINIMAL, adapter)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for rename in ("layers", "_orig_mod.layers", "base_model.model._orig_mod.layers"):
        changed = {key.replace("base_model.model.layers", rename): tensor for key, tensor in tensors.items()}
        save_file(changed, tmp_path / "adapter_model.safetensors")
        assert set(store.load(tmp_path).sites) == set(adapter.sites)


def test_a_bias_that_the_config_does_not_train_is_unknown(tmp_path: Path) -> None:
    peft_folder(tmp_path, MINIMAL)
    tensors = load_file(tmp_path / "adapter_model.safetensors") | {"base_model.model.norm.bias": torch.ones(3)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterFileError, match=r"norm\.bias': is unknown"):
        store.load(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(MINIMAL | {"bias": "all"}))
    assert store.load(tmp_path).sites["norm.bias"].geometry == Geometry(kind="bias", shape=(3,))


def test_parameters_that_no_option_names(tmp_path: Path) -> None:
    sites = {"e.up": factors(Geometry(kind="parameter", shape=(2, 4, 3)), 2), "e.down": factors(
        Geometry(kind="parameter", shape=(2, 3, 4)), 2)}
    adapter = Adapter(LoraConfig(r=2, target_modules=[], target_parameters=["e.up", "e.down"]), sites)
    folder = peft_folder(tmp_path, {"r": 2, "target_parameters": ["e.up"]}, adapter)
    with pytest.raises(AdapterFileError, match="one of 2 adapted parameters of 'e'"):
        store.load(folder)


def test_parameters_are_settled_by_the_model(tmp_path: Path) -> None:
    sites = {"e.up": factors(Geometry(kind="parameter", shape=(2, 5, 3)), 2),
             "e.down": factors(Geometry(kind="parameter", shape=(2, 3, 5)), 2)}
    adapter = Adapter(LoraConfig(r=2, lora_alpha=8, target_modules=[], target_parameters=["up", "down"]), sites)
    loaded = store.load(peft_folder(tmp_path, {"r": 2, "target_parameters": ["down", "up"]}, adapter))
    assert loaded.sites["e.down"].geometry.shape == (2, 5, 3)  # assumed in the config's order, and wrong
    settled = store.settle_parameters(loaded, lambda module: ["bias", "up", "down"] if module == "e" else [])
    assert {name: site.geometry for name, site in settled.sites.items()} == {n: s.geometry for n, s in sites.items()}
    assert all(torch.equal(settled.sites[name].A, sites[name].A) for name in sites)
    assert "unsettled_parameters" not in settled.facts
    assert store.settle_parameters(settled, lambda module: []) is settled
    with pytest.raises(AdapterFileError, match="module 'e': has 1 of the parameters"):
        store.settle_parameters(loaded, lambda module: ["up"])


# ---------------------------------------------------------------------------------------------------------- places


def test_subfolders(tmp_path: Path) -> None:
    adapters = {name: small(rank) for name, rank in (("sql", 1.0), ("poet", 2.0))}
    adapters["sql"].save(tmp_path / "sql")
    assert_same_adapter(store.load(tmp_path), adapters["sql"])  # the only one
    adapters["poet"].save(tmp_path / "poet")
    with pytest.raises(AdapterFileError, match=r"has no adapter_config\.json.*subfolder=: poet, sql"):
        store.load(tmp_path)
    assert_same_adapter(store.load(str(tmp_path), subfolder="poet"), adapters["poet"])
    with pytest.raises(AdapterFileError, match="does not exist"):
        store.load(tmp_path, subfolder="prose")


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    small().save(tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "exploded",)

    for path in (tmp_path / "a" / "adapter_model.bin", tmp_path / "weights.pt"):
        path.write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(AdapterFileError, match=r"is a pickle, which can run any code.*save it again"):
            store.load(tmp_path / "a" if path.suffix == ".bin" else path)
    assert not (tmp_path / "exploded").exists()


def test_missing_places(tmp_path: Path) -> None:
    small().save(tmp_path / "adapter")
    with pytest.raises(AdapterFileError, match=r"does not exist.*Did you mean adapter"):
        store.load(tmp_path / "adaptor")
    with pytest.raises(AdapterFileError, match="is a file; expected an adapter's folder"):
        store.load(tmp_path / "adapter" / "adapter_config.json")
    with pytest.raises(AdapterFileError, match="expected an adapter on the Hub"):
        store.load(tmp_path / "adapter", revision="main")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterFileError, match=r"has no adapter_model\.safetensors"):
        store.load(tmp_path / "adapter")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterFileError, match=r"has no adapter_config\.json"):
        store.load(tmp_path / "empty")


@pytest.mark.parametrize("name", ["", ".", "..", "/", "no such", "a/b/c", "../x", "nul\0byte", "x" * 5000])
def test_odd_paths(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterFileError):
        store.load(name)


def test_a_folder_replaced_while_it_is_read_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deltaw.store import read

    small(1.0).save(tmp_path / "a")
    real, times = read.read_tensors, []

    def slow(path: Path) -> dict[str, torch.Tensor]:
        times.append(1)
        if len(times) == 1:
            small(2.0, r=4).save(tmp_path / "a")
        return real(path)

    monkeypatch.setattr(read, "read_tensors", slow)
    assert_same_adapter(store.load(tmp_path / "a"), small(2.0, r=4))
    assert len(times) == 2


class Hub:
    """A Hub with one repository, whose downloads are noted."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, []  # type: ignore[var-annotated]

    def snapshot_download(self, repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        if repo != "some/adapter":
            raise LocalEntryNotFoundError("offline")
        self.asked.append((revision, allow_patterns))
        return str(self.folder)

    def list_repo_files(self, api: object, repo: str, *, revision: str | None) -> list[str]:
        return [path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "snapshot")
    hub.folder.mkdir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files",
                        lambda api, repo, revision: hub.list_repo_files(api, repo, revision=revision))
    return hub


def test_only_our_files_are_fetched_from_the_hub(hub: Hub) -> None:
    adapter = small()
    adapter.save(hub.folder)
    assert_same_adapter(store.load("some/adapter", revision="v2"), adapter)
    assert hub.asked == [("v2", ["adapter_config.json", "adapter_model.safetensors", "deltaw.json"])]


def test_subfolders_on_the_hub(hub: Hub) -> None:
    adapter = small()
    adapter.save(hub.folder / "sql")
    assert_same_adapter(store.load("some/adapter", subfolder="sql"), adapter)
    assert hub.asked[-1][1][0] == "sql/adapter_config.json"
    assert_same_adapter(store.load("some/adapter"), adapter)
    adapter.save(hub.folder / "poet")
    with pytest.raises(AdapterFileError, match="subfolder=: poet, sql"):
        store.load("some/adapter")


def test_a_pickle_on_the_hub_is_refused(hub: Hub) -> None:
    (hub.folder / "adapter_config.json").write_text(json.dumps(MINIMAL))
    (hub.folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(AdapterFileError, match=r"some/adapter: adapter_model\.bin: is a pickle"):
        store.load("some/adapter")


def test_no_network(hub: Hub) -> None:
    with pytest.raises(AdapterFileError, match="other/adapter: is no local folder, and cannot be fetched"):
        store.load("other/adapter")


def test_no_network_in_earnest() -> None:
    with pytest.raises(AdapterFileError, match="nobody/nothing: is no local folder, and cannot be fetched"):
        store.load("nobody/nothing")


def test_a_linear_site_at_the_root_of_the_model(tmp_path: Path) -> None:
    adapter = Adapter(LoraConfig(r=2), {"": linear()})
    loaded = store.load(peft_folder(tmp_path, {"r": 2, "lora_alpha": 16, "target_modules": "all-linear"}, adapter))
    assert torch.equal(loaded.delta(""), adapter.delta(""))
