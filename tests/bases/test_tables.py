"""A base whose vocabulary's tables are loaded in 8 bits: what is packed, what is refused, what can be done with it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import deltaw
from deltaw.bases import Fingerprint, compare, fingerprint, load_base, tables
from deltaw.bases.quantize import Quantization
from deltaw.core.packed import Int8Rows
from deltaw.core.tables import PackedEmbedding, PackedHead
from deltaw.errors import BaseModelError, ConfigError, StateError, TargetError
from tests.bases.tiny import llama, tokenizer, write

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 48}
IDS = torch.arange(12)[None]


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    model = llama(**SHAPE, tie_word_embeddings=request.param).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base", max_shard_size="60KB")
    tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def packed(folder: Path, quantize: Any = "nf4", **options: Any) -> Any:
    return load_base(str(folder), dtype="fp32", quantize=quantize, quantize_tables="int8", **options)


def dense(module: Any) -> torch.Tensor:
    """A table's values in float64."""
    found: torch.Tensor = module.weight.data.double() * (module.weight.absmax.double() / 127).unsqueeze(1)
    return found


def test_tables_are_read_out_of_a_mapped_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read by position, as layers are, each strip of a table would read all of it: a 0.5B's took 20 seconds so."""
    import safetensors

    own, read = safetensors.safe_open, []

    class Noted:
        def __init__(self, file: Any, **options: Any) -> None:
            self.file, self.backend = own(file, **options), options.get("backend")

        def __enter__(self) -> Noted:
            return self

        def __exit__(self, *_: Any) -> None:
            read.append((self.backend, "closed"))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def get_slice(self, key: str) -> Any:
            read.append((self.backend, key))
            return self.file.get_slice(key)

    monkeypatch.setattr(safetensors, "safe_open", Noted)
    base = packed(folder)
    tables_read = [key for backend, key in read if backend == "mmap" and key != "closed"]
    tied = base.model.lm_head.weight is base.model.model.embed_tokens.weight
    assert sorted(tables_read) == ["lm_head.weight", "model.embed_tokens.weight"][tied:]
    assert read.count(("mmap", "closed")) == len(tables_read)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_the_tables_are_packed_and_all_else_is_as_without(folder: Path, kind: Any) -> None:
    plain, base = load_base(str(folder), dtype="fp32", quantize=kind), packed(folder, kind)
    assert base.quantized == f"{plain.quantized}, int8 tables"
    assert Quantization.read(base.quantized) == Quantization(format=kind, tables="int8")
    body, head = base.model.model, base.model.lm_head
    assert (type(body.embed_tokens), type(head)) == (PackedEmbedding, PackedHead)
    tied = plain.model.lm_head.weight is plain.model.model.embed_tokens.weight
    assert (head.weight is body.embed_tokens.weight) == tied
    for mine, theirs in ((body.embed_tokens, plain.model.model.embed_tokens), (head, plain.model.lm_head)):
        W = theirs.weight.detach().double()
        step = W.abs().amax(1, keepdim=True) / 127
        assert float(((dense(mine) - W).abs() / step).max()) <= 0.5 + 1e-5
    for name, parameter in base.model.named_parameters():
        if not isinstance(parameter, Int8Rows):
            assert torch.equal(parameter, plain.model.get_parameter(name))
    with torch.no_grad():
        plain.model.model.embed_tokens.weight.copy_(dense(body.embed_tokens))
        plain.model.lm_head.weight.copy_(dense(head))
        wanted, got = plain.model(IDS).logits, base.model(IDS).logits
    assert float((got - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


def lies_in(tensor: torch.Tensor) -> str:
    """The file that is mapped where a tensor lies; "" for memory of the process."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        span, *_, file = line.split(maxsplit=5)
        start, stop = (int(end, 16) for end in span.split("-"))
        if start <= tensor.data_ptr() < stop:
            return file if file.startswith("/") else ""
    return ""


@pytest.mark.skipif(sys.platform != "linux", reason="what is mapped where is read as Linux tells it")
def test_no_table_is_read_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltaw.core.tables.STRIP", 4 * 10 * 64)
    rows: list[int] = []
    pack_rows = deltaw.core.tables.pack_rows

    def watched(W_RI: torch.Tensor) -> Any:
        rows.append(len(W_RI))
        if W_RI.untyped_storage().nbytes() > 10 * 64 * 2:  # of a whole one a view of the file, not of memory
            assert lies_in(W_RI).endswith(".safetensors")
        return pack_rows(W_RI)

    monkeypatch.setattr("deltaw.core.tables.pack_rows", watched)
    base = packed(folder)
    tied = base.model.lm_head.weight is base.model.model.embed_tokens.weight
    assert rows == (1 if tied else 2) * [10, 10, 10, 10, 8]


def test_a_table_that_the_checkpoint_names_otherwise(tmp_path: Path, tiny_gpt2: Callable[..., Any]) -> None:
    model = tiny_gpt2(n_embd=64)
    write(tmp_path, model.transformer)  # as GPT-2's own files: "wte.weight", without the prefix
    base = packed(tmp_path)
    assert base.model.lm_head.weight is base.model.transformer.wte.weight
    assert isinstance(base.model.transformer.wte, PackedEmbedding)
    assert type(base.model.transformer.wpe) is nn.Embedding  # positions stay as they are
    W = model.transformer.wte.weight.detach()
    step = W.abs().amax(1, keepdim=True) / 127
    assert float(((dense(base.model.lm_head) - W).abs() / step).max()) <= 0.5 + 1e-5


def test_gemma_scales_its_rows(tmp_path: Path) -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Gemma3TextConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, vocab_size=32, max_position_embeddings=64, layer_types=["full_attention"]))
    base = packed(write(tmp_path, model))
    ids = torch.arange(8)[None]
    rows, wanted = base.model.get_input_embeddings()(ids), model.get_input_embeddings()(ids).detach()
    assert base.model.get_input_embeddings().embed_scale == 8
    assert float((rows - wanted).abs().max()) <= 0.5 / 127 * float(wanted.abs().max()) * (1 + 1e-5)


def test_a_classifier_has_one_table(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
                                 vocab_size=32), add_pooling_layer=False)
    base = packed(write(tmp_path, model), task="seq-cls", labels=["no", "yes"])
    assert isinstance(base.model.bert.embeddings.word_embeddings, PackedEmbedding)
    assert type(base.model.bert.embeddings.position_embeddings) is nn.Embedding
    assert type(base.model.classifier) is nn.Linear
    assert base.model(torch.ones(1, 4, dtype=torch.long)).logits.isfinite().all()


def test_what_cannot_be_packed_is_refused_before_a_weight_is_read(tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, llama(**SHAPE))
    with pytest.raises(ConfigError, match=r"quantize_tables.*without quantize.*leave quantize_tables out"):
        load_base(str(tmp_path), quantize_tables="int8")
    with pytest.raises(ConfigError, match=r"quantize_tables: got 'int7'"):
        load_base(str(tmp_path), quantize="nf4", quantize_tables="int7")  # type: ignore[arg-type]

    class Own(nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) + 1

    model = llama(**SHAPE)
    model.model.embed_tokens = Own(48, 64)
    fault, = tables.table_faults("base 'x'", model)
    assert "'model.embed_tokens' is a Own" in str(fault)
    assert "Leave quantize_tables out" in str(fault)
    model = llama(**SHAPE, tie_word_embeddings=True)
    model.extra = nn.Linear(64, 48, bias=False)
    model.extra.weight = model.lm_head.weight
    fault, = tables.table_faults("base 'x'", model)
    assert "'extra' shares its weight with a table" in str(fault)
    monkeypatch.setattr("deltaw.bases.quantize.table_faults", lambda *_: [fault])
    with pytest.raises(BaseModelError, match="shares its weight"):
        packed(tmp_path)


def test_a_saved_model_holds_plain_tables(folder: Path, tmp_path: Path) -> None:
    base = packed(folder)
    base.model.save_pretrained(tmp_path / "saved")
    tokenizer().save_pretrained(tmp_path / "saved")
    again = load_base(str(tmp_path / "saved"), dtype="fp32")
    assert again.quantized == "bitsandbytes"
    assert type(again.model.lm_head) is nn.Linear
    with torch.no_grad():
        assert torch.equal(again.model(IDS).logits, base.model(IDS).logits)


def test_the_fingerprint_is_the_bases(folder: Path) -> None:
    plain, base = load_base(str(folder), dtype="fp32"), packed(folder)
    mine, theirs = (fingerprint(model.named_parameters()) for model in (base.model, plain.model))
    assert compare(theirs, mine) is None
    assert all(x == x for x in mine.sample)
    assert compare(Fingerprint.from_dict(mine.to_dict()), theirs) is None


def test_text_is_generated_as_by_the_dense_tables(folder: Path) -> None:
    plain, base = load_base(str(folder), dtype="fp32", quantize="nf4"), packed(folder)
    with torch.no_grad():
        plain.model.model.embed_tokens.weight.copy_(dense(base.model.model.embed_tokens))
        plain.model.lm_head.weight.copy_(dense(base.model.lm_head))
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted, got = (model.generate(IDS[:, :4], **options) for model in (plain.model, base.model))
    assert torch.equal(wanted, got)


def test_adapters_beside_tables_and_on_them(folder: Path, tmp_path: Path) -> None:
    base = packed(folder)
    config = deltaw.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens", "lm_head"])
    board = deltaw.attach(base.model.train(), config, seed=0)
    with torch.no_grad():
        for parameter in board.parameters("default").values():
            parameter.normal_(0, 0.1)
    base.model(IDS).logits.logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in board.parameters("default").values())
    board.adapter("default").save(tmp_path / "adapter")
    plain = load_base(str(folder), dtype="fp32", quantize="nf4")
    with torch.no_grad():
        plain.model.model.embed_tokens.weight.copy_(dense(base.model.model.embed_tokens))
        plain.model.lm_head.weight.copy_(dense(base.model.lm_head))
    deltaw.attach(plain.model, deltaw.load(tmp_path / "adapter"))
    with torch.no_grad():
        wanted, got = plain.model.eval()(IDS).logits, base.model.eval()(IDS).logits
    assert float((got - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())
    for into in (None, "requantized"):
        with pytest.raises(StateError, match=r"lm_head.*table in 8 bits.*merge_files"):
            board.merge(into=into)


def test_tables_are_not_trained_in_full(folder: Path) -> None:
    config = deltaw.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(TargetError, match=r"'lm_head' holds a table in 8 bits.*without quantize_tables"):
        deltaw.attach(packed(folder).model, config)
