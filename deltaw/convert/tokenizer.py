"""A tokenizer as GGUF metadata: copied from a GGUF file of the base, or worked out from `tokenizer.json`.

llama.cpp has tokenizers of its own and knows by name how text is cut before merging (`tokenizer.ggml.pre`). The name is
found from the rule that stands in `tokenizer.json`; a rule that is not known is an error, for a wrong name gives other
tokens without a word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltaw.errors import BaseModelError, Fault

_GPT4 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")
_BY_PATTERN = {_GPT4 % "{1,3}": "llama-bpe", _GPT4 % "": "qwen2"}
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "▁"
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator", "mask": "mask"}
_PROBE = "a"


def copy_from_gguf(file: Path, writer: Any) -> str:
    """Copy the tokenizer's whole block of another GGUF file; returns what to call that source."""
    import gguf

    fields = gguf.GGUFReader(file).fields
    found = [field for name, field in fields.items() if name.startswith("tokenizer.")]
    if not any(field.name == "tokenizer.ggml.tokens" for field in found):
        raise BaseModelError(Fault(f"'{file}'", "holds no tokenizer", "a GGUF file of a model"))
    for field in found:
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    return f"{file.name}, copied"


def describe_tokenizer(folder: Path, vocab_size: int, writer: Any) -> str:
    """Write the tokenizer of a model folder; returns what to call it."""
    core, tokenizer = _load(folder)
    model = core.get("model") or {}
    if model.get("type") != "BPE":
        raise _refused(folder, f"is of type {model.get('type')!r}", "a BPE tokenizer")
    if model.get("byte_fallback"):
        name, pre = "llama", "default"
        writer.add_add_space_prefix(_adds_space(core))
    else:
        name, pre = "gpt2", _pre_name(folder, core)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    tokens, types = _tokens(core, tokenizer, vocab_size)
    writer.add_tokenizer_model(name)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    if name == "llama":
        writer.add_token_scores(_scores(tokens, merges))
    writer.add_token_types(types)
    if name == "gpt2":
        writer.add_token_merges(merges)
    for role, key in _SPECIAL.items():
        number = getattr(tokenizer, f"{role}_token_id", None)
        if number is not None:
            writer.add_uint32(f"tokenizer.ggml.{key}_token_id", int(number))
    first = tokenizer(_PROBE)["input_ids"]
    writer.add_add_bos_token(bool(first) and first[0] == tokenizer.bos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
    return f"tokenizer.json ({name}, {pre})"


def _load(folder: Path) -> tuple[dict[str, Any], Any]:
    from transformers import AutoTokenizer

    from deltaw.bases.quiet import quiet_transformers

    try:
        core = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        with quiet_transformers():
            return core, AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # each tokenizer class fails in its own way
        raise _refused(folder, f"cannot be read ({error})", "tokenizer.json beside the weights") from error


def _refused(folder: Path, got: str, expected: str) -> BaseModelError:
    return BaseModelError(Fault(f"the tokenizer of '{folder}'", got, expected,
                                "Give a GGUF file of the same base to copy it from: tokenizer='base.gguf'"))


def _pre_name(folder: Path, core: Mapping[str, Any]) -> str:
    """llama.cpp's name of the rule by which text is cut into words."""
    rule = core.get("pre_tokenizer") or {}
    steps = rule.get("pretokenizers", [rule])
    kinds = [step.get("type") for step in steps]
    pattern = next((step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"), None)
    if kinds == ["Split", "ByteLevel"] and pattern in _BY_PATTERN and not steps[1].get("use_regex", True):
        return _BY_PATTERN[pattern]
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return "smollm"
    if kinds == ["ByteLevel"] and rule.get("use_regex", True):
        return "gpt-2"
    raise _refused(folder, f"cuts text by a rule that has no known name ({kinds})", "the rule of GPT-2, SmolLM, "
                   "Llama 3 or Qwen 2")


def _tokens(core: Mapping[str, Any], tokenizer: Any, size: int) -> tuple[list[str], list[int]]:
    """Every token's text and type by id, with unused ones up to the size of the embedding."""
    vocabulary = {number: text for text, number in tokenizer.get_vocab().items()}
    added = {token["id"]: token for token in core.get("added_tokens") or ()}
    unknown = tokenizer.unk_token_id
    tokens, types = [], []
    for number in range(size):
        text = vocabulary.get(number)
        if text is None:
            text, kind = f"[PAD{number}]", _UNUSED
        elif number == unknown and not (number in added and number == tokenizer.eos_token_id):
            kind = _UNKNOWN if (core.get("model") or {}).get("byte_fallback") else _CONTROL
        elif number in added:
            kind = _CONTROL if added[number].get("special") else _USER
        else:
            is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
            kind = _BYTE if is_byte and (core.get("model") or {}).get("byte_fallback") else _NORMAL
        tokens.append(text)
        types.append(kind)
    return tokens, types


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Scores by which SentencePiece would merge in the order of the merges: earlier ones are higher."""
    rank: dict[str, int] = {}
    for position, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", "", 1), position)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _adds_space(core: Mapping[str, Any]) -> bool:
    """Whether a space is put before the text."""
    normalizer = core.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    rule = core.get("pre_tokenizer") or {}
    return any(step.get("type") == "Prepend" and step.get("prepend") == _SPACE for step in steps) or \
        (rule.get("type") == "Metaspace" and rule.get("prepend_scheme") in ("always", "first"))
