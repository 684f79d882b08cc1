"""`merge_files` against merging in memory: the same bits on disk, in folders that plain transformers loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import deltaw
from deltaw import store
from deltaw.errors import StateError
from deltaw.merge import merge_files

IDS = torch.arange(3, 15).reshape(2, 6)


def llama(**fields: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**small | fields))


def mixtral(**fields: Any) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3}
    return MixtralForCausalLM(MixtralConfig(**small | fields))


def gpt2(**fields: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, **fields))


def bert(kind: str = "BertForSequenceClassification", **fields: Any) -> Any:
    import transformers

    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_labels": 3}
    return getattr(transformers, kind)(transformers.BertConfig(**small | fields))


def resnet() -> Any:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1],
                                                     layer_type="basic", num_labels=3))


def saved(model: Any, folder: Path, **options: Any) -> Callable[[], Any]:
    """Save a model; a function that loads it again, as it is in memory when someone uses it."""
    model.eval().save_pretrained(folder, **options)
    return lambda: type(model).from_pretrained(folder).eval()


def tensors(folder: Path) -> dict[str, Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def output(model: Any) -> Tensor:
    with torch.no_grad():
        if model.main_input_name == "pixel_values":
            return model(torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)).logits
        return model(IDS).logits


def check(load: Callable[[], Any], folder: Path, out: Path, config: deltaw.LoraConfig, **options: Any) -> Any:
    """Merge on disk and in memory; the parameters must have the same bits and the outputs be equal."""
    adapted = load()
    board = deltaw.attach(adapted, config, seed=3)
    moved = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in board.parameters("default").items():
            if "lora" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=moved) * 0.1)
    adapter = board.adapter("default")
    live = output(adapted)
    report = merge_files(folder, adapter, out, **options)
    merged = deltaw.detach(adapted, merge="default")
    again = type(merged).from_pretrained(out).eval()
    wanted, got = merged.state_dict(), again.state_dict()
    assert wanted.keys() == got.keys()
    assert [name for name in wanted if not torch.equal(wanted[name], got[name])] == []
    assert torch.equal(output(again), output(merged))
    close = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}[next(again.parameters()).dtype]
    torch.testing.assert_close(output(again), live, rtol=close, atol=close)
    assert not torch.allclose(output(again), output(load()), rtol=close, atol=close)
    assert report.base_check == "weights"
    return report


RANDOM = {"r": 4, "lora_alpha": 64, "init_lora_weights": False}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fields", [
    {}, {"target_modules": ("q_proj", "embed_tokens")}, {"target_modules": ("lm_head",), "use_rslora": True},
    {"target_modules": ("q_proj",), "modules_to_save": ("lm_head", "norm")},
], ids=["all-linear", "embedding", "head", "saved"])
def test_a_llama_has_the_bits_of_merging_in_memory(tmp_path: Path, dtype: torch.dtype, fields: dict[str, Any]) -> None:
    load = saved(llama(tie_word_embeddings=False).to(dtype), tmp_path / "base")
    report = check(load, tmp_path / "base", tmp_path / "out", deltaw.LoraConfig(**RANDOM | fields))
    assert not report.untied


@pytest.mark.parametrize(("build", "fields"), [
    (gpt2, {"target_modules": ("c_attn", "c_proj")}),
    (gpt2, {"target_modules": ("c_attn",), "target_slices": {"c_attn": "q-v"}, "bias": "all"}),
    (bert, {"task_type": "SEQ_CLS"}),
    (bert, {"task_type": "SEQ_CLS", "bias": "lora_only", "target_modules": ("query", "word_embeddings")}),
    (resnet, {"target_modules": ("convolution",), "modules_to_save": ("classifier",)}),
    (mixtral, {"target_modules": ("q_proj",)}),
    (mixtral, {"target_modules": ("q_proj",), "target_parameters": ("experts.gate_up_proj", "experts.down_proj")}),
], ids=["conv1d", "slices-and-biases", "classifier", "biases", "convolutions", "router-model", "experts"])
def test_other_kinds_of_models_have_the_bits_of_merging_in_memory(tmp_path: Path, build: Callable[[], Any],
                                                                  fields: dict[str, Any]) -> None:
    load = saved(build(), tmp_path / "base")
    check(load, tmp_path / "base", tmp_path / "out", deltaw.LoraConfig(**RANDOM | fields))


def test_experts_stored_one_by_one_get_their_parts(tmp_path: Path) -> None:
    load = saved(mixtral(), tmp_path / "base")
    config = deltaw.LoraConfig(**RANDOM, target_modules=(), target_parameters=("experts.gate_up_proj",))
    report = check(load, tmp_path / "base", tmp_path / "out", config)
    base, merged = tensors(tmp_path / "base"), tensors(tmp_path / "out")
    assert base.keys() == merged.keys()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {name for name in base if name.endswith((".w1.weight", ".w3.weight"))}
    assert len(report.changes) == len(changed)


# ----------------------------------------------------------------------------------------------------------- in files


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "16KB"}], ids=["one file", "shards"])
def test_what_is_not_touched_is_copied_byte_for_byte(tmp_path: Path, options: dict[str, Any]) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    load = saved(llama().to(torch.bfloat16), base, **options)
    (base / "tokenizer.json").write_text('{"a": 1}', encoding="utf-8")
    (base / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("x", encoding="utf-8")
    (base / "LICENSE").write_text("free", encoding="utf-8")
    (base / "optimizer.pt").write_bytes(b"no")
    report = check(load, base, out, deltaw.LoraConfig(**RANDOM, target_modules=("v_proj",)))
    before, after = tensors(base), tensors(out)
    assert before.keys() == after.keys()
    assert {n for n in before if not torch.equal(before[n], after[n])} == {c.tensor for c in report.changes} == {
        f"model.layers.{i}.self_attn.v_proj.weight" for i in (0, 1)}
    assert {p.name for p in base.iterdir()} - {p.name for p in out.iterdir()} == {"optimizer.pt"}
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "LICENSE"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert (out / "additional_chat_templates" / "tools.jinja").read_text(encoding="utf-8") == "x"
    assert json.loads((out / "config.json").read_text(encoding="utf-8")) == json.loads(
        (base / "config.json").read_text(encoding="utf-8"))
    assert set(report.files) == {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert report.tensors == len(before)
    assert report.bytes == sum(t.numel() * t.element_size() for t in before.values())
    if options:
        assert len(list(out.glob("*.safetensors"))) > 2
        index = [json.loads((f / "model.safetensors.index.json").read_text(encoding="utf-8")) for f in (base, out)]
        assert index[0]["weight_map"] == index[1]["weight_map"]
        assert index[1]["metadata"]["total_size"] == report.bytes


def test_another_dtype_is_written_and_named_in_the_config(tmp_path: Path) -> None:
    load = saved(llama(), tmp_path / "base")
    board = deltaw.attach(load(), deltaw.LoraConfig(**RANDOM))
    report = merge_files(tmp_path / "base", board.adapter("default"), tmp_path / "out", dtype="bf16")
    merged = deltaw.detach(board.model, merge="default").to(torch.bfloat16).state_dict()
    found = tensors(tmp_path / "out")
    assert all(t.dtype == torch.bfloat16 and torch.equal(t, merged[name]) for name, t in found.items())
    assert report.bytes == sum(t.numel() * 2 for t in found.values())
    again = llama().from_pretrained(tmp_path / "out")
    assert again.dtype == torch.bfloat16


def test_an_adapter_folder_and_a_gguf_conversion_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deltaw.bases import gguf

    load = saved(llama(), tmp_path / "converted")
    board = deltaw.attach(load(), deltaw.LoraConfig(**RANDOM))
    store.save(board.adapter("default"), tmp_path / "adapter")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    asked = []

    def converted(file: Path, dtype: torch.dtype) -> Path:
        asked.append((file.name, dtype))
        return tmp_path / "converted"

    monkeypatch.setattr(gguf, "converted", converted)
    report = merge_files(tmp_path / "model.gguf", tmp_path / "adapter", tmp_path / "out")
    assert asked == [("model.gguf", torch.float32)]
    assert report.base_check == "weights"
    board.merge()
    assert torch.equal(output(llama().from_pretrained(tmp_path / "out").eval()), output(board.model))


def test_progress_goes_up_to_the_size_of_the_weights(tmp_path: Path) -> None:
    load = saved(llama(), tmp_path / "base", max_shard_size="16KB")
    adapter = deltaw.attach(load(), deltaw.LoraConfig(**RANDOM)).adapter("default")
    seen: list[tuple[int, int]] = []
    report = merge_files(tmp_path / "base", adapter, tmp_path / "out", progress=lambda *now: seen.append(now))
    assert len(seen) == report.tensors
    assert seen == sorted(seen)
    assert seen[-1] == (report.bytes, report.bytes)


def test_the_report_counts_what_changed_and_what_rounding_lost(tmp_path: Path) -> None:
    load = saved(llama().to(torch.bfloat16), tmp_path / "base")
    config = deltaw.LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=("down_proj",))
    adapter = deltaw.attach(load(), config, seed=1).adapter("default")
    report = merge_files(tmp_path / "base", adapter, tmp_path / "out")
    base, out = tensors(tmp_path / "base"), tensors(tmp_path / "out")
    assert 0.05 < report.changed < 0.999  # some of so small a change is lost in bfloat16
    for change in report.changes:
        delta = adapter.delta(change.site).double()
        kept = out[change.tensor].double() - base[change.tensor].double()
        assert change.entries == kept.numel()
        assert change.changed == int((kept != 0).sum())
        assert change.largest == pytest.approx(float(delta.abs().max()), rel=1e-4)
        assert change.lost == pytest.approx(float((kept - delta).norm() / delta.norm()), rel=1e-3)
    assert report.changed == sum(c.changed for c in report.changes) / sum(c.entries for c in report.changes)
    assert report.largest == max(c.largest for c in report.changes)
    json.dumps(report.to_dict())


# ------------------------------------------------------------------------------------------------------------- tied


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("which", ["head", "embedding", "both", "saved"])
def test_tied_weights_that_differ_are_both_written(tmp_path: Path, build: Callable[..., Any], which: str) -> None:
    load = saved(build(tie_word_embeddings=True), tmp_path / "base")
    embedding = "embed_tokens" if build is llama else "wte"
    inner = "down_proj" if build is llama else "c_fc"
    fields = {"head": {"target_modules": ("lm_head",)}, "embedding": {"target_modules": (embedding,)},
              "both": {"target_modules": ("lm_head", embedding)},
              "saved": {"target_modules": (inner,), "modules_to_save": ("lm_head",)}}
    assert "lm_head.weight" not in tensors(tmp_path / "base")
    report = check(load, tmp_path / "base", tmp_path / "out", deltaw.LoraConfig(**RANDOM | fields[which]))
    assert report.untied
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["tie_word_embeddings"] is False
    found = tensors(tmp_path / "out")
    other = next(name for name in found if embedding in name)
    assert not torch.equal(found["lm_head.weight"], found[other])


def test_tied_weights_that_do_not_change_stay_tied(tmp_path: Path) -> None:
    load = saved(llama(tie_word_embeddings=True), tmp_path / "base", max_shard_size="16KB")
    report = check(load, tmp_path / "base", tmp_path / "out", deltaw.LoraConfig(**RANDOM))
    assert not report.untied
    assert "lm_head.weight" not in tensors(tmp_path / "out")
    again = llama().from_pretrained(tmp_path / "out")
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_untied_weights_in_shards_are_found_by_the_index(tmp_path: Path) -> None:
    load = saved(llama(tie_word_embeddings=True), tmp_path / "base", max_shard_size="16KB")
    check(load, tmp_path / "base", tmp_path / "out", deltaw.LoraConfig(**RANDOM, target_modules=("lm_head",)))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert "lm_head.weight" in index["weight_map"]


# ------------------------------------------------------------------------------------------------------ names, heads


def test_a_new_head_is_added_to_a_body_that_had_none(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    bert("BertModel").save_pretrained(tmp_path / "base")
    assert not any(name.startswith("bert.") for name in tensors(tmp_path / "base"))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=4).eval()
    board = deltaw.attach(model, deltaw.LoraConfig(**RANDOM, task_type="SEQ_CLS"))
    board.note("default", training={"data": {"labels": ["red", "green", "blue", "grey"]}})
    merge_files(tmp_path / "base", board.adapter("default"), tmp_path / "out")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    board.merge()
    assert torch.equal(output(again), output(model))
    assert again.config.id2label == {0: "red", 1: "green", 2: "blue", 3: "grey"}
    assert again.config.architectures == ["BertForSequenceClassification"]
    assert tensors(tmp_path / "out").keys() == model.state_dict().keys() - {
        name for name in model.state_dict() if "deltaw" in name}  # one way of naming, as the class itself would save


def test_a_classifier_on_a_language_model_keeps_its_body(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    llama(tie_word_embeddings=True, pad_token_id=0).save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5).eval()
    board = deltaw.attach(model, deltaw.LoraConfig(**RANDOM, task_type="SEQ_CLS"))
    report = merge_files(tmp_path / "base", board.adapter("default"), tmp_path / "out")
    board.merge()
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(output(again), output(model))
    assert again.config.num_labels == 5
    assert "score.weight" in {change.tensor for change in report.changes}


def test_an_adapter_of_the_body_fits_the_whole_model_and_the_other_way_round(tmp_path: Path) -> None:
    whole = bert().eval()
    whole.save_pretrained(tmp_path / "whole")
    whole.bert.save_pretrained(tmp_path / "body")
    config = deltaw.LoraConfig(**RANDOM, target_modules=("query", "dense"), exclude_modules=("pooler.dense",))
    body = deltaw.attach(bert("BertModel").from_pretrained(tmp_path / "body"), config, seed=1)
    report = merge_files(tmp_path / "whole", body.adapter("default"), tmp_path / "one")
    assert report.base_check == "shapes"
    names = deltaw.attach(bert().from_pretrained(tmp_path / "whole"), config, seed=1)
    merge_files(tmp_path / "body", names.adapter("default"), tmp_path / "two")
    merge_files(tmp_path / "whole", names.adapter("default"), tmp_path / "three")
    one, two, three = (tensors(tmp_path / folder) for folder in ("one", "two", "three"))
    assert one.keys() == three.keys()
    assert all(torch.equal(one[name], three[name]) for name in one)
    assert two.keys() == tensors(tmp_path / "body").keys()
    assert all(torch.equal(two[name], three[f"bert.{name}"]) for name in two)


def test_names_of_older_checkpoints_are_understood(tmp_path: Path) -> None:
    """LayerNorm.gamma and .beta, as BERT's first checkpoints have them."""
    from safetensors.torch import save_file

    load = saved(bert(), tmp_path / "base")
    renamed = {}
    for name, tensor in tensors(tmp_path / "base").items():
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        renamed[old] = tensor.clone()
    assert any(name.endswith(".gamma") for name in renamed)
    save_file(renamed, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    config = deltaw.LoraConfig(**RANDOM, task_type="SEQ_CLS", bias="all")
    report = check(load, tmp_path / "base", tmp_path / "out", config)
    assert tensors(tmp_path / "out").keys() == renamed.keys()
    assert any(change.tensor.endswith(".beta") for change in report.changes)


def test_an_architecture_that_transformers_does_not_know_is_merged_by_names_and_shapes(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    load = saved(llama(tie_word_embeddings=True), base)
    adapter = deltaw.attach(load(), deltaw.LoraConfig(**RANDOM)).adapter("default")
    merge_files(base, adapter, tmp_path / "known")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps(config | {"model_type": "mystery"}), encoding="utf-8")
    assert merge_files(base, adapter, out).base_check == "shapes"
    one, other = tensors(out), tensors(tmp_path / "known")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    embedding = deltaw.attach(llama(), deltaw.LoraConfig(**RANDOM, target_modules=("embed_tokens",)))
    with pytest.raises(StateError, match="tied"):
        merge_files(base, embedding.adapter("default"), tmp_path / "no")
