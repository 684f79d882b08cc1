"""The Modelfile that `ollama create` builds a model from, with the chat template as Ollama writes templates.

Chat templates are Jinja, Ollama's are Go's. What a template does is learned by rendering messages with marks in them:
the text before and after the content of each role. The pieces, put together for a conversation of several turns, must
give what the template itself gives; one that does more (tools, dates, joined turns) gets no TEMPLATE, and
a comment that says so: Ollama then reads the GGUF file's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaw.bases import render
from deltaw.errors import DataError

_MARKS = {"system": "\u2983system\u2984", "user": "\u2983user\u2984", "assistant": "\u2983assistant\u2984"}
_CONVERSATION = ("system", "user", "assistant", "user", "assistant", "user")


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """What a chat template puts around the content of each role."""

    around: dict[str, tuple[str, str]]
    answer: str
    """What stands before an answer that is to be written."""
    system: str | None
    """What the system says where no message of its is given."""

    def text(self, messages: list[dict[str, str]]) -> str:
        """The messages as these pieces give them, up to the answer."""
        return "".join(message["content"].join(self.around[message["role"]]) for message in messages) + self.answer


def modelfile(tokenizer: Any, *, base: str | Path, adapter: str | Path | None = None) -> str:
    """The text of a Modelfile: `base` and `adapter` are GGUF files by the names that stand in it."""
    lines = [f"FROM {_path(base)}"]
    if adapter is not None:
        lines.append(f"ADAPTER {_path(adapter)}")
    turns = learn_turns(tokenizer)
    if turns is None:
        lines.append("# The chat template cannot be written as Ollama's: the one in the GGUF file counts.")
    else:
        lines.append(f'TEMPLATE """{go_template(turns)}"""')
        if turns.system:
            lines.append(f'SYSTEM """{turns.system}"""')
    stops = [tokenizer.eos_token, *([turns.around["assistant"][1].strip()] if turns else [])]
    lines += [f'PARAMETER stop "{stop}"' for stop in dict.fromkeys(stops) if stop and '"' not in stop]
    return "\n".join(lines) + "\n"


def go_template(turns: Turns) -> str:
    """The pieces as a Go template over `.Messages`."""
    parts = []
    for position, (role, (before, after)) in enumerate(turns.around.items()):
        parts.append(f'{{{{ {"else " if position else ""}if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}')
    return "{{ range .Messages }}" + "".join(parts) + "{{ end }}{{ end }}" + turns.answer


def learn_turns(tokenizer: Any) -> Turns | None:
    """The pieces of a tokenizer's chat template, or None where it is more than pieces."""
    if not isinstance(tokenizer.chat_template, str):
        return None
    turns = _learn(tokenizer)
    if turns is None:
        return None
    pieces = [turns.answer, turns.system or "", *(piece for pair in turns.around.values() for piece in pair)]
    if any(forbidden in piece for piece in pieces for forbidden in ("{{", "}}", '"""')):
        return None
    several = [{"role": role, "content": f"{role} says {number}"} for number, role in enumerate(_CONVERSATION)]
    return turns if turns.text(several) == _text(tokenizer, several, answer=True) else None


def _learn(tokenizer: Any) -> Turns | None:
    marked = [{"role": role, "content": _MARKS[role]} for role in ("system", "user", "assistant", "user")]
    whole, asked = _text(tokenizer, marked, answer=False), _text(tokenizer, marked[:2], answer=True)
    answered = _text(tokenizer, marked[:3], answer=False)
    two, alone = _text(tokenizer, marked[:2], answer=False), _text(tokenizer, marked[1:2], answer=False)
    if whole is None or asked is None or answered is None or two is None or alone is None or not asked.startswith(two):
        return None
    answer = asked.removeprefix(two)
    try:
        head, rest = whole.split(_MARKS["system"])
        between, middle, tail = rest.split(_MARKS["user"])
        before_answer, after_answer = middle.split(_MARKS["assistant"])
    except ValueError:  # a mark is missing or repeated
        return None
    if not before_answer.endswith(answer):
        return None
    after_user = before_answer.removesuffix(answer)
    if tail != after_user:
        return None
    end = answered.rpartition(_MARKS["assistant"])[2]
    if not after_answer.startswith(end):
        return None
    before_user = after_answer.removeprefix(end)
    around = {"system": (head, between.removesuffix(before_user)), "user": (before_user, after_user),
              "assistant": (answer, end)}
    return Turns(around=around, answer=answer, system=_default_system(alone, around))


def _default_system(alone: str, around: dict[str, tuple[str, str]]) -> str | None:
    """What the template says for the system when the user speaks first."""
    start = alone.split(_MARKS["user"])[0].removesuffix(around["user"][0])
    before, after = around["system"]
    if not start.startswith(before) or not start.endswith(after) or len(start) <= len(before) + len(after):
        return None
    return start.removeprefix(before).removesuffix(after)


def _text(tokenizer: Any, messages: list[dict[str, str]], *, answer: bool) -> str | None:
    """The template's text, without the token that every text begins with: Ollama adds that itself."""
    try:
        text = render(tokenizer, messages, answer)
    except DataError:
        return None
    return text.removeprefix(tokenizer.bos_token) if tokenizer.bos_token and _adds_bos(tokenizer) else text


def _adds_bos(tokenizer: Any) -> bool:
    first = tokenizer("a")["input_ids"]
    return bool(first) and first[0] == tokenizer.bos_token_id


def _path(path: str | Path) -> str:
    """A path as a Modelfile has it: relative ones start with a dot."""
    text = str(path)
    return text if Path(text).is_absolute() or text.startswith(".") else f"./{text}"
