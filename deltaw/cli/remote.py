"""A conversation with a server that speaks OpenAI's API: `deltaw chat --url`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from deltaw.cli.output import say
from deltaw.cli.writing import Sampling
from deltaw.errors import ConfigError, Fault, StateError, near

TIMEOUT_S = 600
HELP = """\
  /use NAME              switch to another model of the server; /use A=0.7 B=0.3 mixes several
  /list                  the server's models, and which is on
  /reset                 forget what was said
  /help                  these commands
  /quit                  leave; so does the end of the input"""


@dataclass
class RemoteConversation:
    """What was said so far, and the server and model that answer."""

    url: str
    sampling: Sampling
    system: str | None = None
    model: str = ""
    mix: dict[str, float] = field(default_factory=dict)
    turns: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in ("http", "https"):
            raise ConfigError(Fault("--url", f"got '{self.url}'", "http://ADDRESS:PORT"))
        self.url = self.url.rstrip("/").removesuffix("/v1")
        self.model = self.model or self.names()[0]

    def names(self) -> list[str]:
        """The server's models, the base first."""
        with self._open("/v1/models") as response:
            return [model["id"] for model in json.load(response)["data"]]

    def answer(self, text: str, on_text: Callable[[str], None]) -> str:
        """The server's answer to the next thing that is said; a question that failed is forgotten."""
        turns = [*self.turns, {"role": "user", "content": text}]
        start = [{"role": "system", "content": self.system}] if self.system else []
        chosen = self.sampling
        asked: dict[str, Any] = {"model": self.model, "messages": start + turns, "stream": True,
                                 "max_tokens": chosen.max_new_tokens, "temperature": chosen.temperature,
                                 "top_p": chosen.top_p, "seed": chosen.seed}
        asked |= {"top_k": chosen.top_k} if chosen.top_k else {}
        asked |= {"repetition_penalty": chosen.repetition_penalty} if chosen.repetition_penalty != 1 else {}
        asked |= {"lora": [{"id": name, "scale": weight} for name, weight in self.mix.items()]} if self.mix else {}
        written = ""
        for piece in self._pieces(asked):
            written += piece
            on_text(piece)
        self.turns = [*turns, {"role": "assistant", "content": written}]
        return written

    def command(self, line: str) -> bool:
        """Do a command; False when it ends the conversation."""
        word, *rest = line.split()
        if word in ("/quit", "/exit"):
            return False
        if word == "/use" and rest:
            self.use(rest)
        elif word == "/list":
            say("\n".join(f"{'* ' if name == self.model else '  '}{name}" for name in self.names()))
        elif word == "/reset":
            self.turns = []
            say("what was said is forgotten")
        elif word == "/help":
            say(HELP)
        else:
            known = ("/use", "/list", "/reset", "/help", "/quit")
            raise ConfigError(Fault(line, "is no command here", "one of " + ", ".join(known), near(word, known)))
        return True

    def use(self, words: list[str]) -> None:
        """Switch to a model of the server, or to a mix of its adapters."""
        names = self.names()
        if len(words) == 1 and words[0] in names:
            self.model, self.mix = words[0], {}
        else:
            mix = {}
            for word in words:
                name, _, number = word.rpartition("=")
                if name not in names or not number.replace(".", "", 1).lstrip("-").isdecimal():
                    raise StateError(Fault("/use", f"got '{word}'", "a model of the server, or NAME=WEIGHT for each of "
                                           "several adapters", near(name or word, names)))
                mix[name] = float(number)
            self.model, self.mix = names[0], mix
        say(f"on: {self.label()}")

    def label(self) -> str:
        """What answers, in short."""
        return " ".join(f"{name}={weight:g}" for name, weight in self.mix.items()) or self.model

    def _pieces(self, asked: Mapping[str, Any]) -> Iterator[str]:
        with self._open("/v1/chat/completions", asked) as response:
            for raw in response:
                line = raw.decode().strip()
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise StateError(Fault(self.url, event["error"]["message"]))
                for choice in event["choices"]:
                    yield choice["delta"].get("content") or ""

    def _open(self, path: str, asked: Mapping[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if os.environ.get("DELTAW_API_KEY"):
            headers["Authorization"] = f"Bearer {os.environ['DELTAW_API_KEY']}"
        data = None if asked is None else json.dumps(asked).encode()
        try:
            return urlopen(Request(self.url + path, data, headers), timeout=TIMEOUT_S)
        except HTTPError as error:
            raise StateError(Fault(self.url, _message(error), "", "DELTAW_API_KEY gives the key" if error.code == 401
                                   else "")) from error
        except (URLError, OSError) as error:
            why = getattr(error, "reason", error)
            raise StateError(Fault(self.url, f"cannot be reached ({why})", "a server", "Start one: deltaw serve")
                             ) from error


def _message(error: HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"]).rstrip(".")
    except (ValueError, KeyError, TypeError):
        return f"answered {error.code}"
