"""A conversation that remembers what was said, and the commands that switch its adapters."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

from deltaw.cli.models import Opened, read_adapter, require_writer
from deltaw.cli.output import say
from deltaw.cli.writing import Writer
from deltaw.errors import ConfigError, Fault, near

HELP = """\
  /use NAME              switch to an adapter; /use A=0.7 B=0.3 mixes several
  /off                   switch to the base
  /add [NAME=]FOLDER     attach another adapter
  /list                  the adapters, and which is on
  /reset                 forget what was said
  /help                  these commands
  /quit                  leave; so does the end of the input"""
COMMANDS = ("/use", "/off", "/add", "/list", "/reset", "/help", "/quit", "/exit")


class Conversation:
    """What was said so far, and with what."""

    def __init__(self, opened: Opened, writer: Writer, *, system: str | None = None) -> None:
        self.opened, self.writer = opened, writer
        self._start = [{"role": "system", "content": system}] if system else []
        self._turns: list[dict[str, str]] = []

    # -- talking -----------------------------------------------------------------------------------------------------

    def answer(self, text: str, on_text: Callable[[str], None]) -> str:
        """The model's answer to the next thing that is said; `on_text` gets each piece of it as it is written.

        The oldest turns are forgotten where the conversation would leave no room. A question that was not answered, on
        an error or Ctrl-C, is forgotten too.
        """
        turns = [*self._turns, {"role": "user", "content": text}]
        tokens, turns = self._fitting(turns)
        answer = self.writer.text(self.writer.write(tokens, on_text))
        self._turns = [*turns, {"role": "assistant", "content": answer}]
        return answer

    def _fitting(self, turns: list[dict[str, str]]) -> tuple[list[int], list[dict[str, str]]]:
        """The tokens of as many of the last turns as leave room for a whole answer, and these turns."""
        limit, longest = self.writer.base.max_positions, self.writer.sampling.max_new_tokens
        tokens = self.writer.template_tokens([*self._start, *turns])
        dropped = 0
        while limit is not None and len(tokens) + longest > limit and len(turns) > 1:
            turns, dropped = turns[2:], dropped + 1
            tokens = self.writer.template_tokens([*self._start, *turns])
        if dropped:
            say(f"the model takes {limit} tokens: the first {dropped} questions and answers are forgotten")
        return tokens, turns

    # -- commands ----------------------------------------------------------------------------------------------------

    def command(self, line: str) -> bool:
        """Do a command; False when it ends the conversation. Raises ConfigError for an unknown one."""
        try:
            word, *rest = shlex.split(line)
        except ValueError as error:
            raise ConfigError(Fault(line, f"cannot be read ({error})", "matching quotes")) from error
        if word not in COMMANDS:
            raise ConfigError(Fault(word, "is no command", "one of " + ", ".join(COMMANDS), near(word, COMMANDS)))
        if word in ("/quit", "/exit"):
            return False
        if word == "/use":
            self.use(rest)
        elif word == "/add":
            self.add(rest)
        elif word == "/off":
            self.switch(None)
            say(self.describe())
        elif word == "/reset":
            self._turns = []
            say("what was said is forgotten")
        else:
            say(HELP if word == "/help" else self.describe())
        return True

    def use(self, words: list[str]) -> None:
        """Switch to one adapter, or to a mix: NAME=WEIGHT for each."""
        if not words:
            raise ConfigError(Fault("/use", "names no adapter", "a name, or NAME=WEIGHT for each of several"))
        if len(words) == 1 and words[0] in self.names():
            self.switch(words[0])
        elif len(words) == 1 and "=" not in words[0]:
            known = ", ".join(self.names()) or "none"
            raise ConfigError(Fault(f"adapter '{words[0]}'", "is not attached", f"one of {known}",
                                    near(words[0], self.names())))
        else:
            self.switch(dict(_weight(word) for word in words))
        say(self.describe())

    def switch(self, choice: str | dict[str, float] | None) -> None:
        """Turn on an adapter, a mix or the base; what was said is kept."""
        self.opened.use(choice)

    def add(self, words: list[str]) -> None:
        """Attach the adapter in a folder, under a name."""
        if len(words) != 1:
            raise ConfigError(Fault("/add", f"got {len(words)} words", "FOLDER or NAME=FOLDER"))
        name, equals, path = words[0].partition("=")
        if not equals or Path(words[0]).is_dir():
            name, path = Path(words[0].rstrip("/")).name, words[0]
        adapter = read_adapter(path)
        require_writer(adapter, f"adapter '{name}'")
        self.opened.add(name, adapter)
        say(f"added '{name}'; /use {shlex.quote(name)} switches to it")

    # -- what there is -----------------------------------------------------------------------------------------------

    def names(self) -> tuple[str, ...]:
        """Names of the attached adapters."""
        return self.opened.board.names if self.opened.board is not None else ()

    def label(self) -> str:
        """What is on, in short."""
        active = self.opened.board.active if self.opened.board is not None else {}
        return " ".join(name if weight == 1 else f"{name}={weight:g}" for name, weight in active.items()) or "base"

    def describe(self) -> str:
        """What is on, and what else there is."""
        active = self.opened.board.active if self.opened.board is not None else {}
        others = [name for name in self.names() if name not in active]
        return f"on: {self.label()}" + (f"; off: {', '.join(others)}" if others else "")


def _weight(word: str) -> tuple[str, float]:
    name, _, number = word.rpartition("=")
    try:
        return name or number, float(number) if name else 1.0
    except ValueError:
        raise ConfigError(Fault("/use", f"got '{word}'", "NAME or NAME=WEIGHT")) from None
