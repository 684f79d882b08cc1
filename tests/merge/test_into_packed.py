"""Merging into a base that bitsandbytes packed: which weights come out, how much of the change survives, exact undo.

The expected values are bitsandbytes' own: the layer's weight dequantized, the sum in float64, quantized again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import deltaw
from deltaw.core.packed import keep_order
from deltaw.errors import BaseModelError, ConfigError, StateError
from deltaw.merge import merge_files
from tests.merge.test_merge_files import gpt2, llama, output, tensors

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:MatMul8bitLt:UserWarning",
                                        "ignore::FutureWarning")
KINDS = ("nf4", "fp4", "nf4-double", "int8")
LARGE, SMALL = 0.3, 1e-3


def load(folder: Path, kind: str = "", dtype: torch.dtype = torch.float32) -> Any:
    """The model of a folder, packed while it is loaded, or as it is."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config: Any = None
    if kind == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    elif kind:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind[:3],
                                    bnb_4bit_use_double_quant=kind.endswith("double"))
    options = {"quantization_config": config, "device_map": "cpu"} if config else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()
    keep_order(model)  # whatever this processor is
    return model


def value_of(host: Any) -> Tensor:
    """What bitsandbytes says that a layer's weight is."""
    if host.weight.dtype == torch.int8:
        scales = host.state.SCB if host.weight.SCB is None else host.weight.SCB
        return bnb.functional.int8_vectorwise_dequant(host.weight.data, scales).double()
    return bnb.functional.dequantize_4bit(host.weight.data, host.weight.quant_state).double()


def bits(host: Any) -> list[Any]:
    """A packed weight and all that goes with it, to the bit."""
    weight = host.weight
    if weight.dtype == torch.int8:
        scales = host.state.SCB if weight.SCB is None else weight.SCB
        return [weight.data.tolist(), scales.tolist(), id(weight)]
    state = weight.quant_state.as_dict(packed=True)
    return [weight.data.tolist(), {k: v.tolist() for k, v in state.items()}, id(weight), id(weight.quant_state),
            host.quant_state is weight.quant_state]


def packed_again(values: Tensor, kind: str) -> Tensor:
    """What bitsandbytes makes of these values."""
    if kind == "int8":
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(values.half())
        return bnb.functional.int8_vectorwise_dequant(codes, scales).double()
    codes, state = bnb.functional.quantize_4bit(values.float(), quant_type=kind[:3], blocksize=64,
                                                compress_statistics=kind.endswith("double"))
    return bnb.functional.dequantize_4bit(codes, state).double()


def adapter_for(model: Any, size: float, **config: Any) -> deltaw.Adapter:
    """An adapter of random factors whose ΔW is about this large beside a weight."""
    board = deltaw.attach(model, deltaw.LoraConfig(r=4, lora_alpha=4, **config), "a", seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in board.parameters("a").values():
        parameter.data = torch.randn(parameter.shape, generator=generator) * (size * 0.02) ** 0.5
    value = board.adapter("a")
    deltaw.detach(model)
    return value


@pytest.fixture(params=("nf4-double", "int8"))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folders(kind: str, tmp_path: Path) -> tuple[Path, Path]:
    """A llama as it was, and packed."""
    torch.manual_seed(0)
    llama(hidden_size=64, intermediate_size=64, num_hidden_layers=1).save_pretrained(tmp_path / "plain")
    load(tmp_path / "plain", kind).save_pretrained(tmp_path / "packed")
    return tmp_path / "plain", tmp_path / "packed"


@pytest.mark.parametrize("kind", KINDS)
def test_requantized_is_bitsandbytes_own_rounding_of_the_sum(kind: str, folders: tuple[Path, Path],
                                                             tmp_path: Path) -> None:
    model = load(folders[1])
    adapter = adapter_for(model, LARGE)
    report = merge_files(folders[1], adapter, tmp_path / "out", into="requantized", force=True)
    assert (report.weights, report.quantization) == ("requantized", kind[:4].rstrip("-"))
    merged = load(tmp_path / "out")
    figures = {change.site: change for change in report.changes}
    along = energy = 0.0
    for site in adapter.sites:
        before, after = value_of(model.get_submodule(site)), value_of(merged.get_submodule(site))
        delta = adapter.delta(site).double()
        expected = packed_again(before + delta, kind)
        step = float((expected - before).abs().max())
        assert float((after - expected).abs().max()) <= 1e-5 * step, site
        got = figures[site]
        share = float(((expected - before) * delta).sum() / delta.square().sum())
        assert got.survived == pytest.approx(share, abs=1e-4)
        assert got.lost == pytest.approx(float((expected - before - delta).norm() / delta.norm()), abs=1e-4)
        along += float(((expected - before) * delta).sum())
        energy += float(delta.square().sum())
    assert report.survived == pytest.approx(along / energy, abs=1e-4)
    assert tensors(tmp_path / "out").keys() == tensors(folders[1]).keys()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == json.loads((folders[1] / "config.json").read_text())["quantization_config"]
    record = json.loads((tmp_path / "out" / "deltaw_merge.json").read_text())
    assert (record["weights"], record["survived"]) == ("requantized", report.survived)


def test_what_the_adapter_leaves_alone_is_copied_byte_for_byte(folders: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = adapter_for(load(folders[1]), LARGE, target_modules=["layers.0.self_attn.q_proj"])
    merge_files(folders[1], adapter, tmp_path / "out", into="requantized", force=True)
    before, after = tensors(folders[1]), tensors(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name]
                                                          if before[name].shape == after[name].shape else
                                                          after[name][:before[name].numel()])}
    assert changed
    assert all(name.startswith("model.layers.0.self_attn.q_proj.") for name in changed)


def test_16bit_of_a_packed_folder_is_its_values_and_of_the_original_the_original(
        kind: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    packed = load(folders[1])
    adapter = adapter_for(packed, LARGE)
    plain = load(folders[0])
    for folder, model, weights in ((folders[1], packed, "dequantized"), (folders[0], plain, "original")):
        out = tmp_path / weights
        report = merge_files(folder, adapter, out, into="16bit", dtype="fp32")
        assert (report.weights, report.survived) == (weights, None)
        assert json.loads((out / "deltaw_merge.json").read_text())["weights"] == weights
        assert "quantization_config" not in json.loads((out / "config.json").read_text())
        merged = load(out)
        for site in adapter.sites:
            host = model.get_submodule(site)
            before = value_of(host) if weights == "dequantized" else host.weight.detach().double()
            expected = before + adapter.delta(site).double()
            assert float((merged.get_submodule(site).weight.detach().double() - expected).abs().max()) < 1e-6, site
    assert not torch.equal(output(load(tmp_path / "dequantized")), output(load(tmp_path / "original")))


def test_a_change_that_rounds_away_is_refused_and_nothing_is_written(folders: tuple[Path, Path], kind: str,
                                                                     tmp_path: Path) -> None:
    model = load(folders[1])
    adapter = adapter_for(model, SMALL)
    with pytest.raises(StateError, match="of the change survives rounding") as refused:
        merge_files(folders[1], adapter, tmp_path / "out", into="requantized")
    assert len(refused.value.faults) == 4  # the whole, and the worst three
    assert sorted(p.name for p in tmp_path.iterdir()) == ["packed", "plain"]
    report = merge_files(folders[1], adapter, tmp_path / "out", into="requantized", force=True)
    assert report.survived is not None
    assert report.survived < 0.5
    board = deltaw.attach(model, adapter, "a")
    before = {site: bits(model.get_submodule(site)) for site in adapter.sites}
    with pytest.raises(StateError, match="survives rounding"):
        board.merge("a", into="requantized")
    assert {site: bits(model.get_submodule(site)) for site in adapter.sites} == before


@pytest.mark.parametrize("ran_before", [False, True])
def test_a_live_merge_equals_the_one_on_disk_and_is_undone_to_the_bit(
        kind: str, folders: tuple[Path, Path], tmp_path: Path, ran_before: bool) -> None:
    model = load(folders[1])
    adapter = adapter_for(load(folders[1]), LARGE)
    plain = output(model) if ran_before else None
    before = {site: bits(model.get_submodule(site)) for site in adapter.sites}
    board = deltaw.attach(model, adapter, "a")
    with pytest.raises(StateError, match="quantized"):
        board.merge("a")
    with pytest.raises(ConfigError, match="only multiply with packed weights"):
        board.merge("a", into="16bit")  # type: ignore[arg-type]
    changes = board.merge("a", into="requantized", force=True)
    assert {change.site for change in changes} == set(adapter.sites)
    report = merge_files(folders[1], adapter, tmp_path / "out", into="requantized", force=True)
    assert {c.site: c.survived for c in changes} == {c.site: c.survived for c in report.changes}
    assert torch.equal(output(model), output(load(tmp_path / "out")))
    board.unmerge()
    assert {site: bits(model.get_submodule(site)) for site in adapter.sites} == before
    for _ in range(3):
        with board.merged("a", into="requantized", force=True):
            output(model)
    assert {site: bits(model.get_submodule(site)) for site in adapter.sites} == before
    board.use(None)
    assert plain is None or torch.equal(output(model), plain)
    deltaw.detach(model, merge="a", into="requantized", force=True)
    assert torch.equal(output(model), output(load(tmp_path / "out")))


def test_shards_and_layers_stored_inputs_first(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gpt2().save_pretrained(tmp_path / "plain")
    load(tmp_path / "plain", "nf4-double").save_pretrained(tmp_path / "packed", max_shard_size="20KB")
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 2
    model = load(tmp_path / "packed")
    adapter = adapter_for(model, LARGE, target_modules=["c_attn", "c_proj"])
    # Packed, its layers are turned, so that the fingerprints differ.
    merge_files(tmp_path / "packed", adapter, tmp_path / "again", into="requantized", force=True, any_base=True)
    merge_files(tmp_path / "packed", adapter, tmp_path / "wide", into="16bit", any_base=True)
    again, wide = load(tmp_path / "again"), load(tmp_path / "wide")
    for site in adapter.sites:
        expected = value_of(model.get_submodule(site)) + adapter.delta(site).double()
        assert float((wide.get_submodule(site).weight.detach().double().t() - expected).abs().max()) < 1e-6
        rounded = packed_again(expected, "nf4-double")
        assert float((value_of(again.get_submodule(site)) - rounded).abs().max()) < 1e-5 * float(rounded.abs().max())


def test_choices_that_do_not_fit(folders: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = adapter_for(load(folders[0]), LARGE)
    with pytest.raises(BaseModelError, match="into='16bit'"):
        merge_files(folders[1], adapter, tmp_path / "out")
    with pytest.raises(ConfigError, match="plain numbers"):
        merge_files(folders[0], adapter, tmp_path / "out", into="requantized")
    with pytest.raises(ConfigError, match="Did you mean 16bit"):
        merge_files(folders[0], adapter, tmp_path / "out", into="16bits")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="fits no packed weights"):
        merge_files(folders[1], adapter, tmp_path / "out", into="requantized", dtype="bf16")
    config = json.loads((folders[1] / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folders[1] / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match=r"quantized \(gptq\)"):
        merge_files(folders[1], adapter, tmp_path / "out", into="16bit")
    assert not (tmp_path / "out").exists()


def test_at_the_command_line(folders: tuple[Path, Path], kind: str, tmp_path: Path,
                             capsys: pytest.CaptureFixture[str]) -> None:
    from deltaw.cli.main import main

    adapter_for(load(folders[1]), SMALL).save(tmp_path / "adapter")
    words = ["merge", "--model", str(folders[1]), "--adapter", str(tmp_path / "adapter"), "--out",
             str(tmp_path / "out")]
    assert main(words) == 1
    assert "16bit" in capsys.readouterr().err
    assert main([*words, "--into", "requantized"]) == 1
    assert "survives rounding" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*words, "--into", "requantized", "--force"]) == 0
    shown = capsys.readouterr().out
    assert f"of the change survived rounding to {kind.partition('-')[0]}" in shown
    assert main([*words, "--into", "16bit", "--overwrite", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["weights"], report["quantization"]) == ("dequantized", kind.partition("-")[0])
