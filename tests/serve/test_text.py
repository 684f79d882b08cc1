"""Text from tokens, piece by piece, against the text of all tokens at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.serve.text import TextStream, widest_token

SENTENCE = "Grüße, 世界 🙂! stop here ENDE\n\nor not"


def decode(tokens: Sequence[int]) -> str:
    """A tokenizer of bytes."""
    return bytes(tokens).decode("utf-8", "replace")


def test_pieces_are_whole_characters_and_make_up_the_text() -> None:
    stream = TextStream(decode)
    pieces = [stream.push(byte) for byte in SENTENCE.encode()]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + stream.flush() == SENTENCE


@settings(max_examples=80, deadline=None)
@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_nothing_of_a_stop_text_is_ever_shown(text: str, stops: list[str]) -> None:
    stream, shown = TextStream(decode, stops), ""
    for byte in text.encode():
        shown += stream.push(byte)
        if stream.stopped:
            break
    shown += stream.flush()
    ends = [at for stop in stops if (at := text.find(stop)) >= 0]
    assert stream.stopped == bool(ends)
    if ends:
        assert text.startswith(shown)
        assert not any(stop in shown for stop in stops)
    else:
        assert shown == text


@pytest.mark.parametrize("stop", ["ENDE", "\n\n", "🙂"])
def test_a_stop_text_that_spans_tokens(stop: str) -> None:
    stream, shown = TextStream(decode, [stop]), ""
    for byte in SENTENCE.encode():
        shown += stream.push(byte)
        if stream.stopped:
            break
    assert shown + stream.flush() == SENTENCE.split(stop)[0]


def of_bytes(merges: Sequence[tuple[str, str]] = ()) -> Any:
    """A tokenizer of bytes, as GPT-2's and its successors', with these merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def test_a_token_stands_for_as_many_characters_as_the_longest() -> None:
    tokenizer = of_bytes([("a", "a"), ("aa", "aa")])
    assert widest_token(tokenizer) == 4
    assert len(tokenizer("a" * 40)["input_ids"]) == 10


def test_where_words_can_be_unknown_a_token_stands_for_any_number(base_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    assert widest_token(tokenizer) is None
    assert len(tokenizer("x" * 1000)["input_ids"]) == 1
