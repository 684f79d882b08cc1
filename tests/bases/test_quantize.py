"""Quantizing while loading, against bitsandbytes' own functions on the weights that were saved."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import deltaw
from deltaw.bases import Fingerprint, compare, load_base
from deltaw.bases.packing import pack_4bit, pack_8bit
from deltaw.core.packed import packed_weight
from deltaw.errors import BaseModelError, ConfigError, MissingDependencyError
from tests.bases.tiny import llama, tokenizer, write

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 48}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = llama(**SHAPE).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    return tmp_path


def own(model: Any, name: str) -> Any:
    found = packed_weight(model.get_submodule(name))
    assert found is not None
    return found


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_packing_gives_the_bits_of_bitsandbytes(kind: str, double: bool, dtype: torch.dtype,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltaw.bases.packing._STRIP", 1024)
    monkeypatch.setattr("deltaw.bases.packing._STRETCH", 2048)
    W = torch.randn(48, 96).to(dtype)
    W[3] = 0
    before = W.clone()
    W[4, :40] = torch.linspace(-1, 1, 40).to(dtype)  # some of them lie on the bounds
    codes, state = pack_4bit(W, kind, double_quant=double)
    theirs, their_state = bnb.functional.quantize_4bit(W, quant_type=kind, compress_statistics=double)
    assert torch.equal(codes, theirs)
    assert torch.equal(W[:4], before[:4])
    assert torch.equal(state.absmax, their_state.absmax)
    unpack = bnb.functional.dequantize_4bit
    assert torch.equal(unpack(codes, state), unpack(theirs, their_state))
    if double:
        assert torch.equal(state.offset, their_state.offset)
        assert torch.equal(state.state2.absmax, their_state.state2.absmax)


def test_packing_rows_in_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltaw.bases.packing._STRIP", 1024)
    monkeypatch.setattr("deltaw.bases.packing._STRETCH", 2048)  # several threads
    W = torch.randn(50, 96)
    codes, absmax = pack_8bit(W)
    theirs, their_absmax, _ = bnb.functional.int8_vectorwise_quant(W.half())
    assert torch.equal(codes, theirs)
    assert torch.equal(absmax, their_absmax)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_linear_layers_are_packed_and_all_else_is_as_stored(folder: Path, kind: Any) -> None:
    plain, base = load_base(str(folder), dtype="fp32"), load_base(str(folder), dtype="fp32", quantize=kind)
    assert base.quantized == ("int8" if kind == "int8" else f"{kind}, double quantization")
    assert base.precision.startswith(base.quantized)
    for name, module in plain.model.named_modules():
        if type(module) is torch.nn.Linear and name != "lm_head":
            W = own(base.model, name).dense(torch.float32)
            error = (W - module.weight).abs().max() / module.weight.abs().max()
            assert error < {"nf4": 0.17, "fp4": 0.2, "int8": 0.01}[kind]
            if kind != "int8":
                state = bnb.functional.quantize_4bit(module.weight.data, quant_type=kind, compress_statistics=True)
                assert torch.equal(W, bnb.functional.dequantize_4bit(*state))
    stored = {n for n, p in base.model.named_parameters() if p.is_floating_point()}
    assert stored == {n for n, p in plain.model.named_parameters() if "_proj" not in n}
    for name in stored:
        assert torch.equal(base.model.get_parameter(name), plain.model.get_parameter(name))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        near = torch.nn.functional.cosine_similarity(base.model(ids).logits, plain.model(ids).logits, dim=-1)
    assert near.min() > 0.9
    assert base.model.generation_config.eos_token_id == plain.model.generation_config.eos_token_id


def test_a_classifier_keeps_its_head_and_layers_without_weights(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
                                 vocab_size=32), add_pooling_layer=False)
    base = load_base(str(write(tmp_path, model)), task="seq-cls", labels=["no", "yes"], quantize="nf4", dtype="fp32")
    assert type(base.model.classifier) is torch.nn.Linear
    assert type(base.model.bert.pooler.dense) is torch.nn.Linear
    assert own(base.model, "bert.encoder.layer.0.attention.self.query").kind == "nf4"
    assert base.fresh == ("bert.pooler.dense.bias", "bert.pooler.dense.weight", "classifier.bias", "classifier.weight")
    assert base.model(torch.ones(1, 4, dtype=torch.long)).logits.isfinite().all()


def test_gpt2s_transposed_layers(tmp_path: Path, tiny_gpt2: Callable[..., Any]) -> None:
    model = tiny_gpt2(n_embd=64)
    base = load_base(str(write(tmp_path, model)), quantize="nf4", dtype="fp32")
    W = own(base.model, "transformer.h.0.attn.c_attn").dense(torch.float32)
    assert W.shape == (192, 64)
    near = torch.nn.functional.cosine_similarity(W, model.transformer.h[0].attn.c_attn.weight.t(), dim=1)
    assert near.min() > 0.98
    assert base.model.lm_head.weight is base.model.transformer.wte.weight


def test_a_saved_quantized_model_is_a_base_as_it_is(folder: Path, tmp_path: Path) -> None:
    base = load_base(str(folder), dtype="fp32", quantize="nf4")
    base.model.save_pretrained(tmp_path / "saved")
    tokenizer().save_pretrained(tmp_path / "saved")
    again = load_base(str(tmp_path / "saved"), dtype="fp32")
    assert again.quantized == "bitsandbytes"
    name = "model.layers.1.mlp.up_proj"
    assert torch.equal(own(again.model, name).dense(torch.float32), own(base.model, name).dense(torch.float32))
    with pytest.raises(BaseModelError, match=r"quantized already \(bitsandbytes\).*Leave quantize out"):
        load_base(str(tmp_path / "saved"), quantize="nf4")


def test_an_adapter_goes_between_a_base_and_its_quantized_self(folder: Path, tmp_path: Path) -> None:
    plain, packed = (load_base(str(folder), dtype="fp32", quantize=kind) for kind in (None, "nf4"))
    value = deltaw.attach(packed.model, deltaw.LoraConfig(r=2), seed=0).adapter("default")
    value.save(tmp_path / "adapter")
    deltaw.attach(plain.model, deltaw.load(tmp_path / "adapter"))
    recorded = Fingerprint.from_dict(value.facts["base"])
    assert recorded.rounded
    assert all(x == x for x in recorded.sample)
    model = llama(**SHAPE)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)) * 0.02)
        other = deltaw.bases.fingerprint((n, p.to(torch.bfloat16)) for n, p in model.named_parameters())
    fault = compare(recorded, other)
    assert fault is not None
    assert "other weights" in fault.got


def test_what_cannot_be_quantized_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = write(tmp_path / "odd", llama(hidden_size=20, intermediate_size=30))
    with pytest.raises(BaseModelError, match=r"blocks of 64: \S+q_proj \(20 inputs\).*quantize=int8"):
        load_base(str(odd), quantize="nf4")
    assert load_base(str(odd), quantize="int8").quantized == "int8"
    with pytest.raises(ConfigError, match=r"got 'nf5'.*Did you mean nf4"):
        load_base(str(odd), quantize="nf5")  # type: ignore[arg-type]
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *rest: None if name == "bitsandbytes" else found(name, *rest))
    with pytest.raises(MissingDependencyError, match=r"(?s)needs bitsandbytes.*deltaw\[quant\].*blocks of 64"):
        load_base(str(odd), quantize="nf4")


@pytest.mark.parametrize(("method", "package"), [("gptq", "gptqmodel"), ("awq", "gptqmodel"), ("torchao", "torchao")])
def test_a_checkpoint_of_another_quantizer_names_its_package(tmp_path: Path, method: str, package: str) -> None:
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    import json

    write(tmp_path, llama())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "quant_type": "int4_weight_only"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(MissingDependencyError, match=rf"is quantized by {method}.*pip install {package}"):
        load_base(str(tmp_path))
