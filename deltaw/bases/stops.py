"""Where an answer ends: the tokens that model, tokenizer and chat template end a turn with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from deltaw.bases.template import render
from deltaw.errors import DataError


def stop_tokens(model: Any, tokenizer: Any, tails: Iterable[Sequence[int]]) -> set[int]:
    """The tokens that end an answer: those of model and tokenizer, and special ones that end these `tails` of examples.

    Some chat templates end a turn with a token that neither the model's nor the tokenizer's settings name.
    """
    configured = getattr(model.generation_config, "eos_token_id", None)
    ends = {configured} if isinstance(configured, int) else set(configured or ())
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    special = set(tokenizer.all_special_ids)
    return ends | {token for tail in tails for token in tail[-2:] if token in special}


def turn_end(tokenizer: Any) -> list[int]:
    """What the chat template writes after an answer, as tokens; empty where there is no template."""
    if not tokenizer.chat_template:
        return []
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        text = render(tokenizer, turns, False).rstrip()
    except DataError:  # a template with demands of its own; the settings have to do
        return []
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
