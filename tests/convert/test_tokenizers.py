"""Tokenizers of the families in GGUF: what cuts the text is named, and two other readers give the same tokens."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from deltaw.convert import model_to_gguf
from deltaw.errors import BaseModelError
from tests.convert.test_gguf import build, read

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
LLAMA_3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
           r"|\s+(?!\S)|\s+")
QWEN_2 = LLAMA_3.replace("{1,3}", "")
TEXTS = ("the thing in the thin tin", " the", "in 1234567 tins, isn't it?", "a\n\n b  c", "thé ✓ the")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
MERGES = [("t", "h"), ("th", "e"), ("i", "n"), ("1", "2"), ("12", "3"), ("4", "5")]


def byte_level(pattern: str | None, *, digits: bool = False) -> Any:
    """A BPE tokenizer over bytes, which cuts text by a pattern, or as SmolLM and GPT-2 do."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [*MERGES, ("Ġ", "the"), ("Ġ", "in")]
    words = ["<s>", "</s>", *alphabet, *("".join(pair) for pair in merges)]
    core = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    if pattern is not None:
        steps = [pre_tokenizers.Split(Regex(pattern), "isolated"),
                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        core.pre_tokenizer = pre_tokenizers.Sequence(steps)
    else:
        last = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), last]) if digits else last
    core.decoder = decoders.ByteLevel()
    return core


def sentence_piece(*, first_space: bool, metaspace: bool) -> Any:
    """A BPE tokenizer of SentencePiece's kind: spaces are letters, and what is unknown is written in bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    merges = [*MERGES, ("▁", "the"), ("▁", "in")]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *LETTERS, *"0123456789,'?",
             *("".join(pair) for pair in merges)]
    core = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges, unk_token="<unk>",
                                byte_fallback=True, fuse_unk=True))
    if metaspace:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if first_space else "never", split=False)
    else:
        steps: list[Any] = [normalizers.Replace(" ", "▁")]
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *steps] if first_space else steps)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return core


KINDS: dict[str, tuple[Any, dict[str, Any], tuple[str, str]]] = {
    "llama 3": (byte_level, {"pattern": LLAMA_3}, ("gpt2", "llama-bpe")),
    "qwen 2": (byte_level, {"pattern": QWEN_2}, ("gpt2", "qwen2")),
    "smollm": (byte_level, {"pattern": None, "digits": True}, ("gpt2", "smollm")),
    "gpt-2": (byte_level, {"pattern": None}, ("gpt2", "gpt-2")),
    "llama 2": (sentence_piece, {"first_space": True, "metaspace": False}, ("llama", "default")),
    "llama 2, metaspace": (sentence_piece, {"first_space": True, "metaspace": True}, ("llama", "default")),
    "gemma": (sentence_piece, {"first_space": False, "metaspace": False}, ("llama", "default")),
}


def written(kind: str, folder: Path, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """A folder's tokenizer as transformers has it, and the metadata of the GGUF file `folder`/m.gguf."""
    from transformers import PreTrainedTokenizerFast

    make, options, _ = KINDS[kind]
    core = make(**{**options, **changes})
    build("llama", folder / "base", vocab_size=core.get_vocab_size() + 3)
    unknown = {"unk_token": "<unk>"} if make is sentence_piece else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", **unknown)
    tokenizer.save_pretrained(folder / "base")
    model_to_gguf(folder / "base", folder / "m.gguf", dtype="f16")
    return tokenizer, read(folder / "m.gguf")[0]


@pytest.mark.parametrize("kind", KINDS)
def test_how_text_is_cut_has_its_name_and_every_token_its_place(kind: str, tmp_path: Path) -> None:
    tokenizer, values = written(kind, tmp_path)
    assert (values["tokenizer.ggml.model"], values["tokenizer.ggml.pre"]) == KINDS[kind][2]
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    assert values["tokenizer.ggml.tokens"][:len(vocabulary)] == [text for text, _ in vocabulary]
    assert values["tokenizer.ggml.add_bos_token"] is False
    types = values["tokenizer.ggml.token_type"]
    if KINDS[kind][0] is sentence_piece:
        assert values["tokenizer.ggml.add_space_prefix"] is KINDS[kind][1]["first_space"]
        assert types[:4] == [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, gguf.TokenType.BYTE]
        ranks = dict(zip(values["tokenizer.ggml.tokens"], values["tokenizer.ggml.scores"], strict=True))
        merged = ["".join(pair) for pair in MERGES]
        assert sorted(merged, key=lambda text: -ranks[text]) == merged
    else:
        assert values["tokenizer.ggml.merges"][:2] == ["t h", "th e"]
        assert types[:3] == [*[gguf.TokenType.CONTROL] * 2, gguf.TokenType.NORMAL]
    assert types[-3:] == [gguf.TokenType.UNUSED] * 3


@pytest.mark.parametrize("kind", ["llama 3", "gpt-2"])
def test_transformers_reads_the_same_tokenizer_back(kind: str, tmp_path: Path) -> None:
    """Where its reader of GGUF goes by the same rule: it cuts every file of a Llama by that of GPT-2."""
    from transformers import AutoTokenizer

    tokenizer, _ = written(kind, tmp_path)
    back = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in ("the thing in the thin tin", " the", "in tins"):
        assert back(text)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_llama_cpp_gives_the_same_tokens(kind: str, tmp_path: Path) -> None:
    from llama_cpp import Llama

    tokenizer, _ = written(kind, tmp_path)
    rival = Llama(model_path=str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    texts = [text for text in TEXTS if kind != "llama 2, metaspace" or text[0] != " "]
    for text in texts:  # llama.cpp has no rule that puts a space before a text only where there is none
        assert rival.tokenize(text.encode(), add_bos=False, special=False) == tokenizer(text)["input_ids"], text


def test_a_rule_that_is_almost_a_known_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"no known name.*GGUF file of the same base"):
        written("llama 3", tmp_path, pattern=LLAMA_3.replace("{1,3}", "{1,2}"))
    assert not (tmp_path / "m.gguf").exists()


def test_a_model_that_is_no_bpe_is_refused(tmp_path: Path) -> None:
    written("gpt-2", tmp_path)
    file = tmp_path / "base" / "tokenizer.json"
    core = json.loads(file.read_text(encoding="utf-8"))
    core["model"] = {"type": "WordLevel", "vocab": core["model"]["vocab"], "unk_token": "<s>"}
    file.write_text(json.dumps(core), encoding="utf-8")
    with pytest.raises(BaseModelError, match="WordLevel"):
        model_to_gguf(tmp_path / "base", tmp_path / "n.gguf")
