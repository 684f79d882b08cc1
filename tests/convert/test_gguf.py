"""GGUF files against three independent readers: the gguf package, transformers' loader, and llama.cpp where it is."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import deltaw
from deltaw.convert import adapter_to_gguf, model_to_gguf
from deltaw.errors import BaseModelError, ConfigError, StateError

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
SMALL: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
                         "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32, "rope_theta": 10000.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "llama tied": {"tie_word_embeddings": True}, "mistral": {"sliding_window": None, "head_dim": 24},
    "qwen2": {}, "qwen3": {"head_dim": 128}, "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16,
                                                           "tie_word_embeddings": True},
    "gemma3_text": {"head_dim": 16, "tie_word_embeddings": True},
}
LOADED = ("llama", "llama tied", "mistral", "qwen2", "qwen3")
"""What transformers' own GGUF loader gives back; it reads no key length of Qwen 3, and no attention scale of Gemma."""
IDS = torch.arange(2, 26).reshape(2, 12)


def build(name: str, folder: Path, **more: Any) -> Any:
    """A tiny model of a family, saved with a tokenizer."""
    import transformers

    kind = name.split()[0]
    config = transformers.CONFIG_MAPPING[kind](**{"tie_word_embeddings": False, **SMALL, **FAMILIES[name], **more})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases that matter, too
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


def write_tokenizer(folder: Path, kind: str = "gpt-2") -> Any:
    """A byte-level BPE tokenizer of a few merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,?!Ġ"
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n")]
    words = ["<s>", "</s>", *letters, *("".join(pair) for pair in merges)]
    words = [*dict.fromkeys(words)]
    core = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "odd":
        core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), core.pre_tokenizer])
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return tokenizer


def read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and dequantized tensors, as the gguf package reads them."""
    reader = gguf.GGUFReader(file)
    values = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: torch.from_numpy(np.array(gguf.quants.dequantize(t.data, t.tensor_type))).float()
               for t in reader.tensors}
    return values, tensors


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("name", LOADED)
def test_transformers_reads_the_same_model_back(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import GgufConfig

    model = build(name, tmp_path / "base")
    report = model_to_gguf(tmp_path / "base", tmp_path / "m.gguf", dtype="f32")
    assert report.bytes == (tmp_path / "m.gguf").stat().st_size
    back = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32,
                                                quantization_config=GgufConfig(dequantize=True)).eval()
    assert float((logits(back) - logits(model)).abs().max()) < 1e-5


def test_rows_of_q_and_k_lie_in_pairs_for_llama_alone(tmp_path: Path) -> None:
    for name, permuted in (("llama", True), ("mistral", True), ("qwen2", False), ("qwen3", False)):
        model = build(name, tmp_path / name)
        model_to_gguf(tmp_path / name, tmp_path / f"{name}.gguf", dtype="f32")
        values, tensors = read(tmp_path / f"{name}.gguf")
        assert values["general.architecture"] == ("llama" if name == "mistral" else name)
        for short, heads in (("q", 4), ("k", 2), ("v", 0)):
            own = getattr(model.model.layers[1].self_attn, f"{short}_proj").weight.detach()
            rows = list(range(own.shape[0]))
            if permuted and heads:
                size = own.shape[0] // heads
                rows = [h * size + i + half for h in range(heads) for i in range(size // 2) for half in (0, size // 2)]
            assert torch.equal(tensors[f"blk.1.attn_{short}.weight"], own[rows])


def test_gemma_norms_and_llama_3_factors(tmp_path: Path) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for name in ("gemma2", "gemma3_text"):
        model = build(name, tmp_path / name)
        model_to_gguf(tmp_path / name, tmp_path / f"{name}.gguf", dtype="f32")
        values, tensors = read(tmp_path / f"{name}.gguf")
        own = model.model.layers[0].input_layernorm.weight.detach()
        assert torch.equal(tensors["blk.0.attn_norm.weight"], own + 1)
        assert torch.equal(tensors["output_norm.weight"], model.model.norm.weight.detach() + 1)
        assert values[f"{values['general.architecture']}.attention.key_length"] == 16
    model = build("llama", tmp_path / "l3", rope_parameters=LLAMA3)
    model_to_gguf(tmp_path / "l3", tmp_path / "l3.gguf", dtype="f32")
    factors = read(tmp_path / "l3.gguf")[1]["rope_freqs.weight"].double()
    plain = 10000.0 ** -(torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    assert float((plain / factors - scaled.double()).abs().max()) < 1e-6
    assert factors.unique().numel() > 2


@pytest.mark.parametrize(("dtype", "bound"), [("f32", 0.0), ("f16", 2**-10), ("bf16", 2**-7), ("q8_0", 2**-6)])
def test_each_number_format(dtype: Any, bound: float, tmp_path: Path) -> None:
    model = build("llama", tmp_path / "base")
    report = model_to_gguf(tmp_path / "base", tmp_path / "m.gguf", dtype=dtype)
    assert report.dtype == dtype
    _, tensors = read(tmp_path / "m.gguf")
    weight = model.model.layers[0].mlp.down_proj.weight.detach()
    error = (tensors["blk.0.ffn_down.weight"] - weight).abs().max() / weight.abs().max()
    assert float(error) <= bound
    assert (float(error) > 0) == (dtype != "f32")
    assert torch.equal(tensors["blk.0.ffn_norm.weight"], model.model.layers[0].post_attention_layernorm.weight)


def make_adapter(model: Any, **config: Any) -> deltaw.Adapter:
    board = deltaw.attach(model, deltaw.LoraConfig(**{"r": 4, "lora_alpha": 6, **config}), "a", seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in board.parameters("a").values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    value = board.adapter("a")
    deltaw.detach(model)
    return value


@pytest.mark.parametrize("config", [
    {}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2, "up_proj": 8}, "alpha_pattern": {"v_proj": 1}},
    {"target_modules": ["q_proj", "k_proj", "embed_tokens", "lm_head"]},
    {"target_modules": ["gate_proj"], "target_slices": {"gate_proj": ((0, 8), (40, 96))}}],
    ids=["plain", "rslora", "patterns", "embedding", "slices"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_an_adapter_is_what_merging_it_changes(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    """llama.cpp adds alpha/R · BA to each tensor of the base's file: it must become the merged model's file."""
    model = build(name, tmp_path / "base")
    adapter = make_adapter(model, **config)
    report = adapter_to_gguf(adapter, tmp_path / "a.gguf", model=tmp_path / "base")
    deltaw.merge_files(tmp_path / "base", adapter, tmp_path / "merged")
    files = {}
    for part in ("base", "merged"):
        model_to_gguf(tmp_path / part, tmp_path / f"{part}.gguf", dtype="f32")
        files[part] = read(tmp_path / f"{part}.gguf")[1]
    values, factors = read(tmp_path / "a.gguf")
    assert (values["general.type"], values["adapter.type"]) == ("adapter", "lora")
    assert values["general.architecture"] == name
    assert values["adapter.lora.alpha"] == pytest.approx(report.alpha)
    assert len(factors) == report.tensors == 2 * len(adapter.sites)
    changed = {key.removesuffix(".lora_a") for key in factors if key.endswith(".lora_a")}
    for tensor, before in files["base"].items():
        after = files["merged"][tensor].double()
        if tensor not in changed:
            assert torch.equal(files["merged"][tensor], before)
            continue
        A, B = factors[f"{tensor}.lora_a"].double(), factors[f"{tensor}.lora_b"].double()
        A = A.t() if tensor == "token_embd.weight" else A
        change = values["adapter.lora.alpha"] / B.shape[1] * (B @ A)
        change = change.t() if tensor == "token_embd.weight" else change
        assert float((before.double() + change - after).abs().max()) < 1e-6, tensor
        assert float((after - before.double()).abs().max()) > 1e-3


def test_a_packed_model_is_written_with_its_values(tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    build("llama", tmp_path / "base")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32, device_map="cpu",
                                                  quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    packed.save_pretrained(tmp_path / "packed")
    write_tokenizer(tmp_path / "packed")
    model_to_gguf(tmp_path / "packed", tmp_path / "m.gguf", dtype="f32")
    weight = packed.model.layers[0].mlp.up_proj.weight
    expected = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    assert torch.equal(read(tmp_path / "m.gguf")[1]["blk.0.ffn_up.weight"], expected)


def test_the_tokenizer_comes_from_the_folder_or_from_another_gguf_file(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    build("llama", tmp_path / "base")
    first = model_to_gguf(tmp_path / "base", tmp_path / "m.gguf", dtype="f32")
    assert first.tokenizer == "tokenizer.json (gpt2, gpt-2)"
    values, _ = read(tmp_path / "m.gguf")
    own = AutoTokenizer.from_pretrained(tmp_path / "base")
    back = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in ("the thing in the thin tin", " the", "in"):
        assert back(text)["input_ids"] == own(text)["input_ids"]
    assert len(values["tokenizer.ggml.tokens"]) == 96
    assert values["tokenizer.ggml.token_type"][0] == gguf.TokenType.CONTROL
    assert values["tokenizer.ggml.token_type"][-1] == gguf.TokenType.UNUSED
    assert (values["tokenizer.ggml.bos_token_id"], values["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert values["tokenizer.chat_template"] == own.chat_template
    write_tokenizer(tmp_path / "base", "odd")
    with pytest.raises(BaseModelError, match="cuts text by a rule"):
        model_to_gguf(tmp_path / "base", tmp_path / "n.gguf")
    copied = model_to_gguf(tmp_path / "base", tmp_path / "n.gguf", tokenizer=tmp_path / "m.gguf")
    assert copied.tokenizer == "m.gguf, copied"
    again, _ = read(tmp_path / "n.gguf")
    mine = {key: value for key, value in values.items() if key.startswith("tokenizer.")}
    assert {key: again[key] for key in mine} == mine


def test_what_has_no_form_is_refused_and_nothing_is_left(tmp_path: Path, tiny_gpt2: Any) -> None:
    model = build("llama", tmp_path / "base")
    tiny_gpt2().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(BaseModelError, match="architecture 'gpt2'"):
        model_to_gguf(tmp_path / "gpt2", tmp_path / "m.gguf")
    biased = make_adapter(build("qwen2", tmp_path / "qwen"), bias="all")
    with pytest.raises(StateError, match="is of kind 'bias'"):
        adapter_to_gguf(biased, tmp_path / "a.gguf", model=tmp_path / "qwen")
    with pytest.raises(ConfigError, match="Did you mean q8_0"):
        model_to_gguf(tmp_path / "base", tmp_path / "m.gguf", dtype="q8")  # type: ignore[arg-type]
    build("mistral", tmp_path / "window", sliding_window=16)
    with pytest.raises(BaseModelError, match="sliding window"):
        model_to_gguf(tmp_path / "window", tmp_path / "m.gguf")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    model.save_pretrained(tmp_path / "large")
    write_tokenizer(tmp_path / "large")
    with pytest.raises(ConfigError, match="too large for f16"):
        model_to_gguf(tmp_path / "large", tmp_path / "m.gguf", dtype="f16")
    assert not [path.name for path in tmp_path.iterdir() if path.is_file()]
    model_to_gguf(tmp_path / "base", tmp_path / "m.gguf")
    with pytest.raises(ConfigError, match="exists"):
        model_to_gguf(tmp_path / "base", tmp_path / "m.gguf")
    model_to_gguf(tmp_path / "base", tmp_path / "m.gguf", overwrite=True)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_llama_cpp_continues_as_we_do(smollm2: Path, tmp_path: Path) -> None:
    """Greedy tokens of the base, of the base with the adapter's file, and of the merged model, in float32."""
    from llama_cpp import Llama
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    adapter = make_adapter(model, use_rslora=True, rank_pattern={"v_proj": 2})
    adapter = deltaw.Adapter(adapter.config, {name: type(site)(site.geometry, {k: t * 0.15 for k, t in
                                                                               site.tensors.items()})
                                              for name, site in adapter.sites.items()}, adapter.facts)
    model_to_gguf(smollm2, tmp_path / "base.gguf", dtype="f32")
    adapter_to_gguf(adapter, tmp_path / "a.gguf", model=smollm2)
    deltaw.merge_files(smollm2, adapter, tmp_path / "merged")
    model_to_gguf(tmp_path / "merged", tmp_path / "merged.gguf", dtype="f32")
    board = deltaw.attach(model, adapter, "a")
    for choice, options in ((None, {"model_path": "base.gguf"}), ("a", {"model_path": "merged.gguf"}),
                            ("a", {"model_path": "base.gguf", "lora_path": "a.gguf"})):
        board.use(choice)
        rival = Llama(**{key: str(tmp_path / file) for key, file in options.items()}, n_ctx=128, verbose=False)
        for prompt in ("The capital of France is", "def add(a, b):\n    return"):
            ids = tokenizer(prompt)["input_ids"]
            ours = model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)[0].tolist()
            rival.reset()
            theirs = list(ids)
            for token in rival.generate(ids, temp=0.0):
                theirs.append(token)
                if len(theirs) == len(ours):
                    break
            assert theirs == ours
