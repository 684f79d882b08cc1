"""Text from tokens, piece by piece, against the text of all tokens at once."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.serve.text import TextStream

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
