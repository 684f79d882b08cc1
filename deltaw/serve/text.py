"""Text as it is written, token by token: whole characters only, and nothing of a stop text."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from deltaw.errors import DataError

UNFINISHED = "\ufffd"
"""What a tokenizer shows for the first bytes of a character."""
CONTEXT = 6
"""Tokens before the new ones that are decoded with them: a token's text depends on what stands before it."""

PROBE = "a  b\n\n\tß世🙂 \ue000. , 's ?  x"
"""Text that only tokenizers which lose nothing give back."""


class PromptTooLong(DataError):
    """A text that has more tokens than a prompt may have, as its length alone tells."""


class TextStream:
    """Turns tokens into pieces of text. `push` gives what is certain; `flush` the rest.

    `before` are tokens that the text goes on from: some tokenizers leave the space out that a text begins with.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = (),
                 before: Sequence[int] = ()) -> None:
        self._decode, self._stops = decode, tuple(stops)
        self._tokens = list(before[-CONTEXT:])
        self._start, self._shown = 0, len(self._tokens)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain after one more token; `stopped` is set once a stop text was found."""
        self._tokens.append(token)
        before = self._decode(self._tokens[self._start:self._shown])
        now = self._decode(self._tokens[self._start:])
        if now.endswith(UNFINISHED) or len(now) <= len(before):
            return ""
        self._start, self._shown = max(self._start, self._shown - CONTEXT), len(self._tokens)
        return self._release(now[len(before):])

    def flush(self) -> str:
        """What was held back because it might have become a stop text, or a character."""
        before = self._decode(self._tokens[self._start:self._shown])
        rest = self._decode(self._tokens[self._start:])[len(before):]
        text = "" if self.stopped else self._release(rest) + self._held
        self._held = ""
        return text

    def _release(self, text: str) -> str:
        whole = self._held + text
        found = [at for stop in self._stops if (at := whole.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return whole[:min(found)]
        keep = max((held_back(whole, stop) for stop in self._stops), default=0)
        self._held = whole[len(whole) - keep:]
        return whole[:len(whole) - keep]


def widest_token(tokenizer: Any) -> int | None:
    """The most characters that one token can stand for; None where a token may stand for any number of them.

    Known where text comes back as it was given. A tokenizer with a token for unknown words, or that drops spaces, gives
    back something else.
    """
    ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    if str(tokenizer.decode(ids)).removeprefix(" ") != PROBE:
        return None
    return max(map(len, tokenizer.get_vocab()))


def bytes_of(tokenizer: Any, token: int) -> bytes | None:
    """The bytes that a token stands for, of which a character may need several; None where they cannot be known."""
    text = str(tokenizer.decode([token]))
    if UNFINISHED not in text:
        return text.encode()
    piece = str(tokenizer.convert_ids_to_tokens(token))
    fallback = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece)
    if fallback is not None:
        return bytes.fromhex(fallback[1])
    alphabet = byte_alphabet()
    return bytes(map(alphabet.__getitem__, piece)) if alphabet.keys() >= set(piece) else None


@cache
def byte_alphabet() -> dict[str, int]:
    """Which byte each character of a vocabulary of bytes stands for, as GPT-2's and its successors' have it.

    Bytes that print stand for themselves; the others, in order, have the characters from 256 on.
    """
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def held_back(text: str, stop: str) -> int:
    """How many characters at the end of a text could be the beginning of a stop text.

    >>> held_back("one\\n", "\\n\\n"), held_back("one", "\\n\\n")
    (1, 0)
    """
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
