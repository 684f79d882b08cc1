"""What `merge_files` refuses, all at once and before anything is written; and what a failed or killed merge leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import deltaw
from deltaw.core import Adapter, SiteDelta
from deltaw.errors import BaseMismatchError, BaseModelError, ConfigError, StateError
from deltaw.merge import merge_files

CONFIG = deltaw.LoraConfig(r=4, lora_alpha=64, init_lora_weights=False, target_modules=("q_proj", "down_proj"))


@pytest.fixture
def base(tiny_llama: Callable[..., Any], tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "base", max_shard_size="16KB")
    return tmp_path / "base"


@pytest.fixture
def adapter(base: Path) -> Adapter:
    return made_on(base)


def made_on(folder: Path, config: deltaw.LoraConfig = CONFIG) -> Adapter:
    from transformers import AutoModelForCausalLM

    return deltaw.attach(AutoModelForCausalLM.from_pretrained(folder), config).adapter("default")


def with_sites(adapter: Adapter, change: Callable[[str, SiteDelta], tuple[str, SiteDelta]]) -> Adapter:
    return Adapter(adapter.config, dict(change(*pair) for pair in adapter.sites.items()), adapter.facts)


def assert_nothing_left(folder: Path) -> None:
    assert not (folder / "out").exists()
    assert [p.name for p in folder.iterdir() if "merging" in p.name] == []


# ------------------------------------------------------------------------------------------------------- wrong bases


def test_other_weights_of_the_same_shape_are_refused(tiny_llama: Callable[..., Any], base: Path, adapter: Adapter,
                                                     tmp_path: Path) -> None:
    tiny_llama(seed=9).save_pretrained(tmp_path / "other")
    with pytest.raises(BaseMismatchError, match="other weights"):
        merge_files(tmp_path / "other", adapter, tmp_path / "out")
    assert_nothing_left(tmp_path)
    assert merge_files(tmp_path / "other", adapter, tmp_path / "out", any_base=True).base_check == "skipped"


def test_another_vocabulary_is_refused_though_all_factors_fit(tiny_llama: Callable[..., Any], adapter: Adapter,
                                                              tmp_path: Path) -> None:
    tiny_llama(vocab_size=80).save_pretrained(tmp_path / "other")
    with pytest.raises(BaseMismatchError, match="names or shapes"):
        merge_files(tmp_path / "other", adapter, tmp_path / "out")


def test_that_no_fingerprint_was_recorded_is_said(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    plain = Adapter(adapter.config, adapter.sites)
    assert merge_files(base, plain, tmp_path / "out").base_check == "not recorded"


def test_all_shapes_that_do_not_fit_are_told(tiny_llama: Callable[..., Any], adapter: Adapter, tmp_path: Path) -> None:
    tiny_llama(intermediate_size=64).save_pretrained(tmp_path / "other")
    with pytest.raises(BaseMismatchError) as caught:
        merge_files(tmp_path / "other", adapter, tmp_path / "out")
    told = [str(fault) for fault in caught.value.faults]
    assert len(told) == 2
    assert all("down_proj" in text and "(32, 64)" in text for text in told)
    assert_nothing_left(tmp_path)


def test_all_names_that_are_unknown_are_told_with_near_ones(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    other = with_sites(adapter, lambda name, site: (name.replace("down_proj", "dwon_proj"), site))
    with pytest.raises(BaseMismatchError) as caught:
        merge_files(base, other, tmp_path / "out")
    assert len(caught.value.faults) == 2
    assert all("Did you mean model.layers" in str(fault) and "down_proj" in str(fault) for fault in caught.value.faults)


# ------------------------------------------------------------------------------------------ changes that do not merge


@pytest.mark.parametrize("factor", [float("nan"), 1e30])
def test_weights_that_would_not_be_finite_are_refused(base: Path, adapter: Adapter, tmp_path: Path,
                                                      factor: float) -> None:
    broken = with_sites(adapter, lambda name, site: (name, SiteDelta(site.geometry, {
        k: t * factor if "layers.1" in name else t for k, t in site.tensors.items()})))
    with pytest.raises(StateError) as caught:
        merge_files(base, broken, tmp_path / "out")
    assert len(caught.value.faults) == 2  # both sites of the layer, and not the first one only
    assert "not finite" in str(caught.value)
    assert_nothing_left(tmp_path)


def test_a_dtype_that_is_too_narrow_is_refused(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(1e5)  # a tensor that no adapter touches
    model.save_pretrained(tmp_path / "base")
    adapter = made_on(tmp_path / "base")
    with pytest.raises(StateError, match=r"norm.weight.*not finite in F16"):
        merge_files(tmp_path / "base", adapter, tmp_path / "out", dtype=torch.float16)
    assert_nothing_left(tmp_path)


def test_quantized_bases_are_refused(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}),
                                      encoding="utf-8")
    with pytest.raises(BaseModelError, match=r"quantized \(bitsandbytes nf4\).*into='16bit'"):
        merge_files(base, adapter, tmp_path / "out")
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for file in base.glob("*.safetensors"):
        codes = {n: t.to(torch.int8) if "q_proj" in n else t for n, t in load_file(file).items()}
        save_file(codes, file, metadata={"format": "pt"})
    with pytest.raises(StateError, match="holds I8: it is quantized"):
        merge_files(base, adapter, tmp_path / "out")
    assert_nothing_left(tmp_path)


def test_a_grouped_convolution_as_peft_trains_it_is_refused(tmp_path: Path) -> None:
    from transformers import RegNetConfig, RegNetForImageClassification

    model = RegNetForImageClassification(RegNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1],
                                                      groups_width=4))
    model.save_pretrained(tmp_path / "base")
    config = deltaw.LoraConfig(r=2, target_modules=r".*stages\.0.*layer\.1\.convolution", init_lora_weights=False)
    adapter = deltaw.attach(model, config).adapter("default")
    assert next(iter(adapter.sites.values())).geometry.groups == 2
    merge_files(tmp_path / "base", adapter, tmp_path / "fine")

    def dense(name: str, site: SiteDelta) -> tuple[str, SiteDelta]:
        A, B = torch.randn(4, 8, 3, 3), torch.randn(8, 2, 1, 1)
        return name, SiteDelta(site.geometry, {"lora_A": A, "lora_B": B})

    with pytest.raises(StateError, match="grouped convolution"):
        merge_files(tmp_path / "base", with_sites(adapter, dense), tmp_path / "out")


def test_parameters_whose_order_is_unknown_are_refused(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    """Of a model that transformers does not know; of one that it knows, the model's own order settles it."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps(config | {"model_type": "mystery"}), encoding="utf-8")
    facts = {"unsettled_parameters": {"model.layers.0.mlp.experts": {"sites": [], "candidates": ["a", "b"]}}}
    with pytest.raises(StateError, match="does not say"):
        merge_files(base, Adapter(adapter.config, adapter.sites, facts), tmp_path / "out")


# ---------------------------------------------------------------------------------------------------- damaged folders


def spoil(base: Path, how: str) -> None:
    index_file = base / "model.safetensors.index.json"
    index = json.loads(index_file.read_text(encoding="utf-8"))
    shards = sorted(base.glob("*.safetensors"))
    match how:
        case "missing shard":
            shards[1].unlink()
        case "cut short":
            shards[1].write_bytes(shards[1].read_bytes()[:-100])
        case "huge header":
            shards[1].write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
        case "traversal":
            index["weight_map"]["lm_head.weight"] = "../outside.safetensors"
        case "wrong place":
            index["weight_map"]["lm_head.weight"] = shards[0].name
            index["weight_map"]["model.norm.weight"] = shards[0].name
        case "twice":
            shutil.copyfile(shards[0], shards[1])
        case "no index":
            index_file.unlink()
            return
        case "not JSON":
            index_file.write_text("{", encoding="utf-8")
            return
    index_file.write_text(json.dumps(index), encoding="utf-8")


@pytest.mark.parametrize(("how", "told"), [
    ("missing shard", "is missing"), ("cut short", "cannot be read"), ("huge header", "cannot be read"),
    ("traversal", "files of this folder"), ("wrong place", "is not in"), ("twice", "each tensor once"),
    ("no index", "has neither"), ("not JSON", "cannot be read"),
])
def test_damaged_and_hostile_checkpoints_are_refused(base: Path, adapter: Adapter, tmp_path: Path, how: str,
                                                     told: str) -> None:
    spoil(base, how)
    with pytest.raises(BaseModelError, match=told):
        merge_files(base, adapter, tmp_path / "out")
    assert_nothing_left(tmp_path)


def test_pickles_and_missing_folders_are_refused(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="no such file or folder"):
        merge_files(tmp_path / "bsae", adapter, tmp_path / "out")
    for file in base.glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    with pytest.raises(BaseModelError, match="pickle"):
        merge_files(base, adapter, tmp_path / "out")


# --------------------------------------------------------------------------------------------------------- the target


def test_the_target_must_be_new_or_a_model_to_replace(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    for where in (base, base / "inside", tmp_path):
        with pytest.raises(ConfigError, match="base's own folder"):
            merge_files(base, adapter, where, overwrite=True)
    out = tmp_path / "out"
    out.mkdir()
    merge_files(base, adapter, out)  # an empty folder is as good as none
    (out / "old.txt").write_text("old", encoding="utf-8")
    with pytest.raises(ConfigError, match="overwrite=True"):
        merge_files(base, adapter, out)
    merge_files(base, adapter, out, overwrite=True)
    assert not (out / "old.txt").exists()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
    with pytest.raises(ConfigError, match="something else than a model"):
        merge_files(base, adapter, tmp_path / "photos", overwrite=True)
    assert (tmp_path / "photos" / "a.jpg").exists()
    with pytest.raises(ConfigError, match="dtype"):
        merge_files(base, adapter, tmp_path / "x", dtype="bfloat61")


def test_a_full_disk_is_told_and_changes_nothing(base: Path, adapter: Adapter, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ConfigError, match="disk is full: 1 bytes are free"):
        merge_files(base, adapter, tmp_path / "out")
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("exists", [False, True])
def test_an_interrupted_merge_leaves_what_was_there(base: Path, adapter: Adapter, tmp_path: Path, exists: bool) -> None:
    out = tmp_path / "out"
    if exists:
        merge_files(base, adapter, out)
        (out / "mine.txt").write_text("mine", encoding="utf-8")
    before = {p.name: p.read_bytes() for p in out.iterdir()} if exists else {}

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_files(base, adapter, out, overwrite=exists, progress=stop)
    assert out.exists() == exists
    assert ({p.name: p.read_bytes() for p in out.iterdir()} if exists else {}) == before
    assert [p.name for p in tmp_path.iterdir() if "merging" in p.name] == []


_KILLED = """
import os, signal, sys
from deltaw.merge import merge_files
def die(done, total):
    if done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)
merge_files(sys.argv[1], sys.argv[2], sys.argv[3], progress=die)
"""


def test_a_killed_merge_leaves_nothing_at_the_target(base: Path, adapter: Adapter, tmp_path: Path, repo: Path) -> None:
    adapter.save(tmp_path / "adapter")
    command = [sys.executable, "-c", _KILLED, str(base), str(tmp_path / "adapter"), str(tmp_path / "out")]
    run = subprocess.run(command, cwd=repo, capture_output=True, check=False)
    assert run.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    left = [p for p in tmp_path.iterdir() if p.name.endswith(".merging")]
    assert len(left) == 1
    os.utime(left[0], (0, 0))  # six hours later, the next merge sweeps it
    merge_files(base, adapter, tmp_path / "out")
    assert [p for p in tmp_path.iterdir() if p.name.endswith(".merging")] == []
