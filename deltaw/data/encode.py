"""Rows into token ids, and which of them are learnt.

A conversation is rendered with the model's own chat template. The text of the k-th assistant turn is what the
template adds when that turn is put behind the messages before it:

    start = len(render(messages[:k], with the assistant's opening))      end = len(render(messages[:k + 1]))

so no template needs to mark it. The whole text is tokenised once, and a token is learnt when its characters reach
into a turn. The end-of-turn token is learnt, so that the model stops; the line break after it is not. Where a
template ends a turn with no special token the tokenizer's end token is added. Some templates change earlier turns
as a conversation goes on (they drop the reasoning, say); then each assistant turn becomes an example of its own,
with the text that the model sees at that turn.

Nothing here looks at the padding token, which for many models is the end token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from deltaw.bases.template import render, require_template
from deltaw.data.rows import Chat, Labelled, Message, Parsed, PromptCompletion, Text
from deltaw.errors import ConfigError, DataError, Fault, near

LEARNT, ANSWER = 1, 2
"""Bits of a token's mark: the loss counts it; it belongs to the text that the model is to produce."""

TRAIN_ON = ("completion", "all")
TEMPLATES = ("auto", "none")


@dataclass(frozen=True, slots=True)
class Encoded:
    """The tokens of an example."""

    ids: NDArray[np.int32]
    """Token ids, of length n."""
    marks: NDArray[np.uint8]
    """For each token LEARNT | ANSWER, or the token type (0 or 1) of a classifier's input."""
    truncated: bool
    """Whether tokens were cut off at the end."""


@dataclass(slots=True)
class _Rendered:
    """A text and the spans of it that are answers."""

    text: str
    spans: list[tuple[int, int]]
    row: int
    raw: bool = False


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Encodes rows with a tokenizer; the options are checked when it is made."""

    tokenizer: Any
    """A fast tokenizer of transformers; it alone knows which characters a token stands for."""
    max_length: int | None = None
    """Tokens kept of an example; longer ones are cut at the end. None keeps all."""
    train_on: Literal["completion", "all"] = "completion"
    """What is learnt: completions and assistant turns only, or every token."""
    template: Literal["auto", "none"] = "auto"
    """"auto" puts prompts and completions into the chat template, where there is one; "none" joins them as they are."""
    _special: NDArray[np.bool_] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        faults = []
        for name, allowed in (("train_on", TRAIN_ON), ("template", TEMPLATES)):
            value = getattr(self, name)
            if value not in allowed:
                faults.append(Fault(name, f"got {value!r}", " or ".join(allowed), near(str(value), allowed)))
        if self.max_length is not None and self.max_length < 2:
            faults.append(Fault("max_length", f"got {self.max_length}", "at least 2 tokens"))
        if not self.tokenizer.is_fast:
            faults.append(Fault("tokenizer", f"{type(self.tokenizer).__name__} cannot say where its tokens lie in the "
                                "text", "a fast tokenizer"))
        if faults:
            raise ConfigError(*faults)
        special = {index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        special |= set(self.tokenizer.all_special_ids)
        table = np.zeros(max(len(self.tokenizer), *special, 0) + 1, dtype=bool)
        table[list(special)] = True
        object.__setattr__(self, "_special", table)

    @property
    def uses_template(self) -> bool:
        """Whether prompts and completions are put into the chat template."""
        return self.template == "auto" and bool(self.tokenizer.chat_template)

    def encode(self, rows: Sequence[Parsed]) -> list[list[Encoded] | DataError]:
        """The examples of each row, or what is wrong with it. Tokenised together, which is fast for some thousands.

        Most rows give one example. A plain text longer than `max_length` gives one for each piece of that length.
        """
        if rows and isinstance(rows[0], Labelled):
            return list(self._encode_labelled([row for row in rows if isinstance(row, Labelled)]))
        results: list[list[Encoded] | DataError] = [[] for _ in rows]
        rendered: list[_Rendered] = []
        for i, row in enumerate(rows):
            try:
                rendered += self._render(row, i)
            except DataError as error:
                results[i] = error
        for item, tokens in zip(rendered, self._tokenise(rendered), strict=True):
            found = results[item.row]
            if isinstance(found, list):
                found += self._pieces(*tokens) if isinstance(rows[item.row], Text) else [self._cut(*tokens)]
        return results

    # ---------------------------------------------------------------------------------------------------- to text

    def _render(self, row: Parsed, number: int) -> list[_Rendered]:
        if isinstance(row, PromptCompletion) and self.uses_template:
            row = Chat((Message("user", row.prompt), Message("assistant", row.completion)))
        if isinstance(row, Chat):
            require_template(self.tokenizer)
            return self._render_chat(row, number)
        if isinstance(row, PromptCompletion):
            start = len(row.prompt) + len(row.separator)
            text = row.prompt + row.separator + row.completion
            return [_Rendered(text, [(start, len(text))], number, raw=True)]
        assert isinstance(row, Text)
        return [_Rendered(row.text, [(0, len(row.text))], number, raw=True)]

    def _render_chat(self, row: Chat, number: int) -> list[_Rendered]:
        messages = [{"role": message.role, "content": message.content} for message in row.messages]
        turns = [k for k, message in enumerate(row.messages) if message.role == "assistant"]
        whole = render(self.tokenizer, messages, False)
        befores, afters = [], []
        for k in turns:
            befores.append(render(self.tokenizer, messages[:k], True))
            afters.append(whole if k == len(messages) - 1 else render(self.tokenizer, messages[: k + 1], False))
        for before, after in zip(befores, afters, strict=True):
            if not after.startswith(before) or len(after) == len(before):
                raise DataError(Fault("chat template", "writes the assistant's opening differently when its answer "
                                      "follows, so that the answer's tokens cannot be told", "the same text",
                                      "Use another template, or rows of prompt + completion with template 'none'"))
        if all(whole.startswith(after) for after in afters):
            spans = [(len(before), len(after)) for before, after in zip(befores, afters, strict=True)]
            return [_Rendered(whole, spans, number)]
        return [_Rendered(after, [(len(before), len(after))], number)
                for before, after in zip(befores, afters, strict=True)]

    # -------------------------------------------------------------------------------------------------- to tokens

    def _tokenise(self, rendered: Sequence[_Rendered]) -> list[tuple[NDArray[np.int32], NDArray[np.uint8]]]:
        """Ids and marks of each text, complete: with the end token, and not yet cut to length."""
        done: dict[int, tuple[NDArray[np.int32], NDArray[np.uint8]]] = {}
        for raw in (False, True):
            chosen = [i for i, item in enumerate(rendered) if item.raw == raw]
            if not chosen:
                continue
            # A chat template writes the start token itself; the tokenizer would add a second one.
            batch = self.tokenizer([rendered[i].text for i in chosen], add_special_tokens=raw, verbose=False,
                                   return_attention_mask=False, return_token_type_ids=False)
            for i, encoding in zip(chosen, batch.encodings, strict=True):
                done[i] = self._mark(rendered[i], encoding)
        return [done[i] for i in range(len(rendered))]

    def _mark(self, item: _Rendered, encoding: Any) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        ids = np.array(encoding.ids, dtype=np.int32)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        answer = np.zeros(len(ids), dtype=bool)
        ended = False
        for start, end in item.spans:
            inside = (offsets[:, 1] > start) & (offsets[:, 0] < end)
            if not item.raw:
                ended = self._trim_after_end(item.text, ids, offsets, inside, end)
            answer |= inside
        end_id = self.tokenizer.eos_token_id
        open_ended = item.raw or (not ended and item.spans[-1][1] == len(item.text))
        if open_ended and end_id is not None:
            if len(ids) and ids[-1] == end_id:  # the tokenizer added it, with no characters of its own
                answer[-1] = True
            else:
                ids, answer = np.append(ids, np.int32(end_id)), np.append(answer, True)
        learnt = answer if self.train_on == "completion" else np.ones(len(ids), dtype=bool)
        marks = (answer * np.uint8(ANSWER) | learnt * np.uint8(LEARNT)).astype(np.uint8)
        return ids, _without_first(marks)

    def _trim_after_end(self, text: str, ids: NDArray[np.int32], offsets: NDArray[np.int64],
                        inside: NDArray[np.bool_], end: int) -> bool:
        """Take what follows the end-of-turn token out of a turn; False when the turn has no such token."""
        special = np.flatnonzero(inside & self._special[ids])
        if not len(special) or text[offsets[special[-1], 1]:end].strip():
            return False
        inside[special[-1] + 1:] = False
        return True

    def _cut(self, ids: NDArray[np.int32], marks: NDArray[np.uint8]) -> Encoded:
        n = self.max_length or len(ids)
        return Encoded(ids[:n], marks[:n], len(ids) > n)

    def _pieces(self, ids: NDArray[np.int32], marks: NDArray[np.uint8]) -> list[Encoded]:
        """A long text in pieces that are next to each other; one token alone predicts nothing and is left off."""
        n = max(self.max_length or len(ids), 1)
        return [Encoded(ids[at:at + n], _without_first(marks[at:at + n]), False)
                for at in range(0, max(len(ids) - 1, 1), n)]

    def _encode_labelled(self, rows: Sequence[Labelled]) -> list[list[Encoded]]:
        pairs = [row.text_pair for row in rows if row.text_pair is not None]
        batch = self.tokenizer([row.text for row in rows], pairs or None, verbose=False, return_attention_mask=False,
                               truncation=self.max_length is not None, max_length=self.max_length)
        return [[Encoded(np.array(e.ids, np.int32), np.array(e.type_ids, np.uint8), bool(e.overflowing))]
                for e in batch.encodings]


def _without_first(marks: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The marks with the first token not learnt: a causal model predicts each token from those before it."""
    first = np.array(marks[:1] & np.uint8(ANSWER), dtype=np.uint8)
    return np.concatenate([first, marks[1:]])
