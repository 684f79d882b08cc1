"""`EncodedData`: a tokenised data set, and how it is made.

One pass reads the rows in chunks, checks and tokenises them, and keeps the tokens in two compact columns (5 bytes a
token) that move to a temporary file when they get large. Every fault of every row is found before training starts.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from deltaw.bases.template import require_template
from deltaw.data.cache import TokenCache, Tokens
from deltaw.data.columns import Columns, EncodeStats
from deltaw.data.encode import ANSWER, LEARNT, Encoder
from deltaw.data.labels import Classes
from deltaw.data.read import files_of, open_source
from deltaw.data.rows import Chat, Labelled, Layout, Parsed, PromptCompletion, find_layout, parse
from deltaw.data.source import FaultLog, Row, Source
from deltaw.data.tokens import Column
from deltaw.errors import ConfigError, DataError, Fault, near

IGNORED = -100
"""The label of a token that is not learnt, as torch's cross-entropy has it."""
_CHUNK = 1000
_IN_MEMORY = 64 << 20
_TASKS = ("causal-lm", "seq-cls")


@dataclass(frozen=True, slots=True)
class Example:
    """The tokens of one example for a causal language model."""

    input_ids: list[int]
    """Token ids, of length n."""
    labels: list[int]
    """The token itself where it is learnt and -100 elsewhere, of length n; not shifted."""
    where: str
    """The file and line it came from."""


@dataclass(frozen=True, slots=True)
class LabelledExample:
    """The tokens of one example for a classifier."""

    input_ids: list[int]
    """Token ids, of length n."""
    token_type_ids: list[int]
    """1 for the tokens of a second text, of length n."""
    label: int
    """The number of its class."""
    where: str
    """The file and line it came from."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model is given, and what it should say."""

    input_ids: list[int]
    """The tokens up to where the last answer starts."""
    answer: str
    """That answer as text, without special tokens."""
    where: str
    """The file and line it came from."""


class EncodedData:
    """Tokenised examples by number; made by `load_data`."""

    def __init__(self, source: Source, encoder: Encoder, layout: Layout, tokens: Tokens, *,
                 from_cache: bool = False) -> None:
        self.source = source
        self.encoder = encoder
        self.stats = tokens.stats
        self.label_names = tokens.label_names
        self.shape = layout.shape
        self.from_cache = from_cache
        """Whether the tokens were found on disk."""
        self._layout = layout
        self._columns = tokens.columns

    def __len__(self) -> int:
        return len(self._columns.ends)

    def __getitem__(self, index: int) -> Example | LabelledExample:
        """The example with this number."""
        ids, marks = self._tokens(index)
        if self._columns.classes is not None:
            label = int(self._columns.classes[self._columns.rows[index]])
            return LabelledExample(ids.tolist(), marks.tolist(), label, self.where(index))
        labels = np.where(marks & LEARNT, ids, IGNORED)
        return Example(ids.tolist(), labels.tolist(), self.where(index))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The number of tokens of each example."""
        return np.diff(self._columns.ends, prepend=0)

    def where(self, index: int) -> str:
        """The file and line of an example."""
        return self.source.where(int(self._columns.rows[index]))

    def prompt(self, index: int) -> Prompt:
        """The example split before its last answer, to let a model answer it; an error for plain text and classes."""
        if self._columns.classes is not None or self.shape == "text":
            raise ConfigError(Fault(self.source.name, f"rows of the shape '{self.shape}' have no prompt and answer",
                                    "chats, or prompts with completions"))
        ids, marks = self._tokens(index)
        answer = (marks & ANSWER) > 0
        end = int(np.flatnonzero(answer)[-1]) + 1
        before = np.flatnonzero(~answer[:end])
        start = int(before[-1]) + 1 if len(before) else 0
        text = self.encoder.tokenizer.decode(ids[start:end].tolist(), skip_special_tokens=True)
        return Prompt(ids[:start].tolist(), str(text), self.where(index))

    def value(self, index: int, field: str) -> Any:
        """What an example's row has beside its text in a field such as database or table; None where nothing."""
        column = self._layout.columns.get(field)
        return None if column is None else self.source[int(self._columns.rows[index])].values.get(column)

    def question(self, index: int) -> str:
        """What was last said to the model before the last answer of an example, in the words of its row."""
        row = parse(self._layout, self.source[int(self._columns.rows[index])])
        if isinstance(row, PromptCompletion):
            return row.prompt
        if isinstance(row, Chat):
            last = max(i for i, message in enumerate(row.messages) if message.role == "assistant")
            return next((m.content for m in reversed(row.messages[:last]) if m.role != "assistant"), "")
        return row.text

    def _tokens(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        start = int(self._columns.ends[index - 1]) if index else 0
        end = int(self._columns.ends[index])
        return self._columns.ids[start:end], self._columns.marks[start:end]


def load_data(
    path: str | Path | Source | Sequence[Mapping[str, Any]], *, tokenizer: Any,
    task: Literal["causal-lm", "seq-cls"] = "causal-lm", split: str = "train",
    columns: Mapping[str, str] | None = None, max_length: int | None = None, model_limit: int | None = None,
    train_on: Literal["completion", "all"] = "completion", template: Literal["auto", "none"] = "auto",
    labels: Sequence[str] | None = None, cache: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> EncodedData:
    """The examples at `path`, tokenised: a file, a folder, a Hub data set id, an open source or rows in memory.

    `columns` maps fields to the data's columns. `max_length` cuts examples and is by default `model_limit`, the most
    that the model takes (`Base.max_positions`). `labels` names the classes; without it they are collected from the
    rows. With `cache` the tokens of larger files are kept for the next time (`deltaw.data.cache`).
    `on_progress(done, total)` is called after each chunk. Raises `DataError` with every bad row (twenty are
    listed), `BaseModelError` for chat rows without a chat template, and `ConfigError` for options that do not fit.

    >>> data = load_data("train.jsonl", tokenizer=base.tokenizer, max_length=512)              # doctest: +SKIP
    """
    if task not in _TASKS:
        raise ConfigError(Fault("task", f"got {task!r}", " or ".join(_TASKS), near(str(task), _TASKS)))
    if max_length is not None and model_limit is not None and max_length > model_limit:
        raise ConfigError(Fault("max_length", f"got {max_length}", f"at most {model_limit}, the longest sequence that "
                                "the model takes", f"Use max_length <= {model_limit}"))
    encoder = Encoder(tokenizer=tokenizer, max_length=max_length or model_limit, train_on=train_on, template=template)
    source = path if isinstance(path, Source) else open_source(path, split)
    layout = find_layout(source, columns, task=task)
    if layout.shape in ("chat", "conversations"):
        require_template(tokenizer)
    named = labels or source.label_names
    files = files_of(path, split) if cache and not isinstance(path, Source) else []
    kept = TokenCache(files, encoder, layout, None if named is None else list(named))
    tokens = kept.read(len(source))
    if tokens is not None:
        return EncodedData(source, encoder, layout, tokens, from_cache=True)
    builder = _Builder(encoder, Classes(named) if task == "seq-cls" else None)
    try:
        for start in range(0, len(source), _CHUNK):
            builder.add(source.read(start, start + _CHUNK), layout, start)
            if on_progress is not None:
                on_progress(min(start + _CHUNK, len(source)), len(source))
        tokens = builder.finish(source.name)
    finally:
        builder.close()
    kept.write(tokens)
    return EncodedData(source, encoder, layout, tokens)


class _Builder:
    """Gathers encoded examples, chunk by chunk."""

    def __init__(self, encoder: Encoder, classes: Classes | None) -> None:
        self._encoder, self._classes, self._log = encoder, classes, FaultLog()
        self._ids, self._marks = Column(np.int32, _IN_MEMORY), Column(np.uint8, _IN_MEMORY // 4)
        self._ends, self._rows = array("q"), array("q")
        self._read = self._dropped = self._truncated = self._supervised = self._tokens = self._longest = 0

    def add(self, rows: Sequence[Row], layout: Layout, first: int) -> None:
        """Check and encode the next rows, of which the first has the number `first`."""
        self._read += len(rows)
        parsed: list[Parsed] = []
        numbers: list[int] = []
        for i, row in enumerate(rows):
            try:
                parsed.append(parse(layout, row))
                numbers.append(i)
            except DataError as error:
                self._log.add(*error.faults)
        if self._classes is not None:
            for i, found in zip(numbers, parsed, strict=True):
                assert isinstance(found, Labelled)
                self._classes.add(found.label, rows[i].where, self._log)
        if self._log.count:
            return  # nothing will be kept; the rows to come are still checked
        for i, made in zip(numbers, self._encoder.encode(parsed), strict=True):
            if isinstance(made, DataError):
                self._log.add(*(f"{rows[i].where}: {fault}" for fault in made.faults))
                continue
            for example in made:
                supervised = 1 if self._classes is not None else int(np.count_nonzero(example.marks & LEARNT))
                if not supervised:
                    self._dropped += 1
                    continue
                self._keep(example.ids, example.marks, first + i)
                self._supervised += supervised
                self._truncated += example.truncated

    def close(self) -> None:
        """Let go of temporary files."""
        self._ids.close()
        self._marks.close()

    def _keep(self, ids: NDArray[np.int32], marks: NDArray[np.uint8], row: int) -> None:
        self._ids.append(ids)
        self._marks.append(marks)
        self._tokens += len(ids)
        self._longest = max(self._longest, len(ids))
        self._ends.append(self._tokens)
        self._rows.append(row)

    def finish(self, name: str) -> Tokens:
        """All tokens, when every row of the data of this name was good and something is left to learn."""
        self._log.raise_if_any()
        if not len(self._ends):
            raise DataError(Fault(name, f"truncation to {self._encoder.max_length} tokens removed every token "
                                  f"to learn from all {self._dropped} examples", "a longer max_length",
                                  "Raise max_length, or shorten the prompts"))
        names, numbers = self._classes.finish(name) if self._classes is not None else (None, None)
        stats = EncodeStats(rows=self._read, examples=len(self._ends), dropped_no_supervision=self._dropped,
                            truncated=self._truncated, supervised_tokens=self._supervised, tokens=self._tokens,
                            longest=self._longest)
        stored = Columns(self._ids.finish(), self._marks.finish(), np.array(self._ends, np.int64),
                          np.array(self._rows, np.int64), numbers)
        return Tokens(stored, stats, names)
