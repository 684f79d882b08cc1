"""Text from tokens, piece by piece, against the text of all tokens at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.serve.text import TextStream, byte_alphabet, bytes_of, widest_token

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


def test_each_token_has_its_own_bytes() -> None:
    from tokenizers import pre_tokenizers

    tokenizer = of_bytes([("a", "a")])
    ids = tokenizer("aaß🙂 ")["input_ids"]
    pieces = [bytes_of(tokenizer, token) for token in ids]
    assert pieces == [b"aa", *(bytes([byte]) for byte in "ß🙂 ".encode())]
    assert sorted(byte_alphabet()) == sorted(pre_tokenizers.ByteLevel.alphabet())


def test_bytes_of_a_vocabulary_with_a_token_for_each_byte() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "\ufffd?", *(f"<0x{byte:02X}>" for byte in range(256))]
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>"))
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    assert [bytes_of(tokenizer, token) for token in tokenizer("é")["input_ids"]] == [b"\xc3", b"\xa9"]
    assert bytes_of(tokenizer, 1) is None


def test_a_text_that_goes_on_from_another_begins_with_its_space() -> None:
    """As sentencepiece's decoders, which leave out the space at the beginning of a text."""
    def words(tokens: Sequence[int]) -> str:
        return " ".join(["one", "two", "three"][token] for token in tokens)

    for before, expected in (((), "two three"), ((0,), " two three"), (tuple([0] * 50), " two three")):
        stream = TextStream(words, before=before)
        assert stream.push(1) + stream.push(2) + stream.flush() == expected
