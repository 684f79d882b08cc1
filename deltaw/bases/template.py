"""The chat template and the tokenizer as facts about a base: rendered, hashed, and compared later.

An adapter learns the exact text around its answers. Used with another template it is silently worse, so the hash of
the template, and of the tokenizer's vocabulary, is stored with the adapter and compared when it is used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from deltaw.errors import BaseModelError, DataError, Fault


def template_hash(tokenizer: Any) -> str | None:
    """SHA-256 of the tokenizer's chat template, or None when it has none."""
    template = tokenizer.chat_template
    if not template:
        return None
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of the vocabulary (every token with its id) and of the special tokens' roles."""
    digest = hashlib.sha256()
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda pair: (pair[1], pair[0])):
        digest.update(f"{index}\0{token}\n".encode("utf-8", "surrogatepass"))
    for role in ("bos_token", "eos_token"):  # not the pad token, which loading may have filled in
        digest.update(f"{role}\0{getattr(tokenizer, role)}\n".encode())
    return digest.hexdigest()


def require_template(tokenizer: Any, *, source: str = "") -> None:
    """Nothing, when the tokenizer has a chat template; else a `BaseModelError` that says what to do."""
    if not tokenizer.chat_template:
        name = source or tokenizer.name_or_path
        raise BaseModelError(Fault(f"base '{name}'", "has no chat template", "one, for rows of chat messages",
                                   "Use the instruct version of this base, set tokenizer.chat_template, or give rows "
                                   "as prompt + completion"))


def render(tokenizer: Any, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
    """The text of these messages in the tokenizer's own chat template.

    With `add_generation_prompt` it ends where the assistant's next turn starts. A template that refuses the messages
    (roles that do not alternate, for one) is a `DataError` with the template's own words.
    """
    from jinja2 import TemplateError

    require_template(tokenizer)
    try:
        text = tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False,
                                             add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        raise DataError(Fault("chat template", f"refuses the messages: {error}")) from error
    return str(text)


def mismatches(facts: Mapping[str, Any], *, quantized: str | None, template: str | None, tokenizer: str) -> list[str]:
    """What an adapter's facts record about its base's storage, template and tokenizer, and this base has otherwise.

    `template` and `tokenizer` are the base's hashes.
    """
    found = []
    stored = facts.get("quantized")
    if stored != quantized:
        found.append(f"It was trained on this base in {stored or 'plain numbers'}, and it is loaded in "
                     f"{quantized or 'plain numbers'}; its answers may differ a little.")
    if "template" in facts:
        text = describe_mismatch(facts["template"], template)
        found += [text] if text else []
    recorded = facts.get("tokenizer")
    if isinstance(recorded, str) and recorded != tokenizer:
        found.append("It was trained with another tokenizer than this base's; its answers may be wrong.")
    return found


def describe_mismatch(recorded: str | None, current: str | None) -> str | None:
    """One sentence on two template hashes that differ, or None when they are the same."""
    if recorded == current:
        return None
    if recorded is None:
        return "The adapter was trained without a chat template, and this tokenizer has one; give it plain prompts."
    if current is None:
        return "The adapter was trained with a chat template, and this tokenizer has none; use its base's tokenizer."
    return (f"The adapter was trained with another chat template ({recorded[:8]}) than this tokenizer's "
            f"({current[:8]}); its answers may be worse. Use the tokenizer it was trained with.")
