"""What a row means: the shapes of examples, found from the columns, and each row checked against its shape.

    chat                messages: [{role, content}, ...]          (or conversations: [{from, value}, ...])
    prompt-completion   prompt, completion
    instruction         instruction, output (and input)
    labelled            text, label (and text_pair)               for classification
    text                text

Chats and prompts may name what their answers, queries, are asked of: a database, or a table.

A data set has one shape, that of its first row; columns that it does not need are ignored. A mapping of fields to
columns adapts other names: {"prompt": "question", "completion": "answer"}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltaw.data.source import Row, Source
from deltaw.errors import ConfigError, DataError, Fault, near

ROLES = ("system", "user", "assistant", "tool")
_ROLE_OF = {"human": "user", "gpt": "assistant"} | {role: role for role in ROLES}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    """system, user, assistant or tool."""
    content: str
    """What was said."""


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation; the assistant's turns are what is learnt."""

    messages: tuple[Message, ...]
    """The turns, in order."""


@dataclass(frozen=True, slots=True)
class PromptCompletion:
    """A prompt and the completion that is learnt."""

    prompt: str
    """What is given."""
    completion: str
    """What is learnt."""
    separator: str = ""
    """What stands between the two when no chat template does."""


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text, all of which is learnt."""

    text: str
    """The text."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text, or a pair of texts, and its class."""

    text: str
    """The text."""
    text_pair: str | None
    """The second text of a pair."""
    label: str
    """The class as it was written."""


Parsed = Chat | PromptCompletion | Text | Labelled
"""What a row holds, checked."""


@dataclass(frozen=True, slots=True)
class _Shape:
    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    task: str = "causal-lm"


_ASKED = ("database", "table")
_SHAPES = (
    _Shape("chat", ("messages",), _ASKED),
    _Shape("conversations", ("conversations",), _ASKED),
    _Shape("prompt-completion", ("prompt", "completion"), _ASKED),
    _Shape("instruction", ("instruction", "output"), ("input", *_ASKED)),
    _Shape("labelled", ("text", "label"), ("text_pair",), task="seq-cls"),
    _Shape("text", ("text",)),
)
FIELDS = tuple(dict.fromkeys(f for shape in _SHAPES for f in (*shape.required, *shape.optional)))


@dataclass(frozen=True, slots=True)
class Layout:
    """The shape of a data set, and the column of each of its fields."""

    shape: str
    """The name of the shape, as in the table above; "conversations" for the second form of a chat."""
    columns: Mapping[str, str]
    """Column of each field that the data set has."""


def find_layout(source: Source, columns: Mapping[str, str] | None = None, *, task: str = "causal-lm") -> Layout:
    """The layout of a data set for a task; `columns` maps fields of a shape to its columns.

    An unknown field is a `ConfigError`; a column that no row has, or columns that fit no shape, a `DataError`.
    """
    mapping = dict(columns or {})
    unknown = [Fault("columns", f"has the unknown field '{field}'", "one of " + ", ".join(FIELDS),
                     near(field, FIELDS)) for field in mapping if field not in FIELDS]
    if unknown:
        raise ConfigError(*unknown)
    listed = ", ".join(source.columns)
    absent = [Fault(source.name, f"has no column '{column}' (for '{field}')", f"one of {listed}",
                    near(column, source.columns)) for field, column in mapping.items() if column not in source.columns]
    if absent:
        raise DataError(*absent)
    first = set(source[0].values)
    present = {field for field in FIELDS if mapping.get(field, field) in first} | set(mapping)
    for shape in _SHAPES:
        fields = (*shape.required, *shape.optional)
        if shape.task == task and present.issuperset(shape.required) and set(mapping) <= set(fields):
            if shape.name == "text" and "label" in present and not mapping:
                break  # to read a labelled text as plain text is a choice that the user has to make
            known = set(source.columns)
            return Layout(shape.name, {f: mapping.get(f, f) for f in fields if mapping.get(f, f) in known})
    raise DataError(_no_shape(source, mapping, task, present))


def parse(layout: Layout, row: Row) -> Parsed:
    """The example in a row; a `DataError` with all that is wrong with it, at its file and line."""
    values = {field: row.values.get(column) for field, column in layout.columns.items()}
    reader = _Fields(layout, values, row.where)
    example: Parsed
    if layout.shape in ("chat", "conversations"):
        example = Chat(reader.messages(layout.shape))
    elif layout.shape == "prompt-completion":
        example = PromptCompletion(reader.text("prompt"), reader.text("completion"))
    elif layout.shape == "instruction":
        prompt, more = reader.text("instruction"), reader.text("input", may_be_empty=True)
        example = PromptCompletion(f"{prompt}\n\n{more}" if more.strip() else prompt, reader.text("output"), "\n\n")
    elif layout.shape == "labelled":
        pair = reader.text("text_pair") if "text_pair" in layout.columns else None
        example = Labelled(reader.text("text"), pair, reader.label())
    else:
        example = Text(reader.text("text"))
    if reader.faults:
        raise DataError(*reader.faults)
    return example


class _Fields:
    """Reads the fields of one row, and collects what is wrong with them."""

    def __init__(self, layout: Layout, values: Mapping[str, Any], where: str) -> None:
        self.faults: list[Fault] = []
        self._layout, self._values, self._where = layout, values, where

    def fault(self, got: str, expected: str = "", remedy: str = "") -> None:
        self.faults.append(Fault(self._where, got, expected, remedy))

    def text(self, field: str, *, may_be_empty: bool = False) -> str:
        value, column = self._values.get(field), self._layout.columns.get(field, field)
        if value is None:
            if not may_be_empty:
                self.fault(f"has no '{column}'", f"a row of the shape '{self._layout.shape}', like the first")
        elif not isinstance(value, str):
            self.fault(f"'{column}' is {type(value).__name__}", "text")
        elif not may_be_empty and not value.strip():
            self.fault(f"'{column}' is empty", "text")
        else:
            return value
        return ""

    def label(self) -> str:
        value, column = self._values.get("label"), self._layout.columns["label"]
        if isinstance(value, bool):
            return str(int(value))
        if isinstance(value, float) and value.is_integer():
            return str(int(value))
        if isinstance(value, int) or (isinstance(value, str) and value.strip()):
            return str(value).strip()
        got = f"has no '{column}'" if value is None or value == "" else f"'{column}' is {value!r}"
        self.fault(got, "the name or number of a class")
        return ""

    def messages(self, shape: str) -> tuple[Message, ...]:
        role_key, content_key = ("role", "content") if shape == "chat" else ("from", "value")
        turns = self._values.get(shape if shape == "conversations" else "messages")
        if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
            got = "has no messages" if not turns else f"its messages are {type(turns).__name__}"
            self.fault(got, f"a list of objects with '{role_key}' and '{content_key}'")
            return ()
        messages = tuple(self._message(i, turn, role_key, content_key) for i, turn in enumerate(turns, 1))
        roles = [message.role for message in messages]
        if not self.faults:
            if "assistant" not in roles:
                self.fault("has no assistant turn", "at least one, to learn from")
            elif roles[: roles.index("assistant")].count("user") == 0:
                self.fault("starts with an assistant turn", "a user's turn before it")
        return messages

    def _message(self, number: int, turn: Any, role_key: str, content_key: str) -> Message:
        if not isinstance(turn, Mapping):
            self.fault(f"message {number} is {type(turn).__name__}", f"an object with '{role_key}', '{content_key}'")
            return Message("", "")
        written, content = turn.get(role_key), turn.get(content_key)
        known = tuple(_ROLE_OF) if role_key == "from" else ROLES
        role = written if isinstance(written, str) and written in known else None
        if role is None:
            self.fault(f"message {number} has the {role_key} {written!r}", "one of " + ", ".join(known),
                       near(str(written), known))
        if not isinstance(content, str):
            self.fault(f"message {number} has a {content_key} of {type(content).__name__}", "text")
        elif not content.strip() and role is not None and _ROLE_OF[role] == "assistant":
            self.fault(f"message {number}, an assistant turn, is empty", "text to learn")
        return Message(_ROLE_OF.get(role or "", ""), content if isinstance(content, str) else "")


def _no_shape(source: Source, mapping: Mapping[str, str], task: str, present: set[str]) -> Fault:
    shapes = [shape for shape in _SHAPES if shape.task == task]
    wanted = "; or ".join(" + ".join(shape.required) for shape in shapes)
    fields = [field for shape in shapes for field in shape.required]
    alike = next((hint for column in source.columns if column not in FIELDS
                  for hint in [near(column, fields, limit=1)] if hint), "")
    example = "text=sentence, label=class" if task == "seq-cls" else "prompt=question, completion=answer"
    remedy = f"Say which column is which, such as columns {example}. {alike}"
    if task == "causal-lm" and {"text", "label"} <= present:
        remedy = "For classes use task 'seq-cls'; to learn the text itself map text=text"
    elif mapping:
        remedy = f"The fields {', '.join(mapping)} belong to no single shape that the columns fill"
    return Fault(source.name, f"has the columns {', '.join(source.columns)}", f"for task '{task}': {wanted}",
                 remedy.strip())
