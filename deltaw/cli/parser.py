"""The argument parser of every verb: complete help, all faults at once, and the nearest known option for a wrong one.

argparse and not click or typer: of the 0.3 s that help may take, importing it takes 0.02 s, click 0.08 s, typer 0.13 s.
What they would add, options from the config's own fields, is in `deltaw.cli.options`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, NoReturn

from deltaw.errors import near

WIDTH = 100
"""Columns of the help, on every terminal: the documentation shows the same text."""


class UsageError(Exception):
    """The command line itself is wrong; exit 2. `faults` holds one line for each thing that is."""

    def __init__(self, *faults: str) -> None:
        self.faults = faults
        super().__init__("\n".join(faults))


@dataclass(frozen=True, slots=True)
class Misread:
    """In place of a value that could not be read: why."""

    fault: str


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help of a fixed width, with the options' names in a column of their own."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=WIDTH, max_help_position=34)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """"-o, --option X", where Python before 3.13 writes "-o X, --option X"."""
        if isinstance(action, argparse.BooleanOptionalAction):
            return f"--[no-]{action.option_strings[0].removeprefix('--')}"
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        values = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {values}"


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `UsageError` where argparse prints and exits."""

    def __init__(self, verb: str, summary: str, *, usage: str, epilog: str = "") -> None:
        super().__init__(prog=f"deltaw {verb}".strip(), usage=f"deltaw {usage}", description=summary, epilog=epilog,
                         formatter_class=HelpFormatter, allow_abbrev=False, add_help=False,
                         argument_default=argparse.SUPPRESS)
        self.verb = verb

    def add_general_options(self, *, json: bool = True) -> None:
        """The options that every verb has; call it last."""
        group = self.add_argument_group("General")
        if json:
            group.add_argument("--json", action="store_true",
                               help="Print one JSON object on stdout, and nothing else there.")
        group.add_argument("--debug", action="store_true", help="Show the traceback of a failure, and every warning.")
        group.add_argument("-h", "--help", action="help", help="Show this text.")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The options that were given; those that were not are absent. Raises `UsageError` with all that is wrong."""
        known = {string for action in self._actions for string in action.option_strings}
        found, extra = self.parse_known_args(_dashed(arguments, known))
        faults = [value.fault for value in vars(found).values() if isinstance(value, Misread)]
        for word in extra:
            name = word.partition("=")[0]
            if name.startswith("-") and name not in ("-", "--"):
                faults.append(f"{name}: unknown option. {near(name, known)}".rstrip())
            elif not faults or not faults[-1].startswith("-"):  # else it is most likely the unknown option's value
                faults.append(f"'{word}': unexpected argument")
        if faults:
            raise UsageError(*faults)
        return found

    def error(self, message: str) -> NoReturn:
        """Raise the fault that argparse found."""
        raise UsageError(re.sub(r"^argument (\S+?)(/\S+)?: ", r"\1: ", message))

    def print_help(self, file: IO[str] | None = None) -> None:  # type: ignore[override]  # typeshed's own protocol is private
        """Write the help to stdout."""
        (file or sys.stdout).write(self.format_help())


def _dashed(arguments: Sequence[str], known: set[str]) -> list[str]:
    """The arguments, with an option that was written like its field ("--lora_alpha") as it is known."""
    written: list[str] = []
    for i, word in enumerate(arguments):
        if word == "--":
            return [*written, *arguments[i:]]
        name, equals, value = word.partition("=")
        dashed = name.replace("_", "-")
        written.append(dashed + equals + value if name.startswith("--") and dashed in known else word)
    return written
