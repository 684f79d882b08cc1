"""A config from a file and the command line; what is wrong with it becomes a `UsageError` that names the options."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from deltaw.cli.options import option_name
from deltaw.cli.parser import UsageError
from deltaw.errors import ConfigError, Fault

T = TypeVar("T")


def build(make: Callable[..., T], values: Mapping[str, Any], *, file: str | None = None) -> T:
    """`make(**values)`; a `ConfigError` about the values becomes a `UsageError` in terms of the command line.

    `file` is where those values that were not given as options come from.
    """
    try:
        return make(**values)
    except ConfigError as error:
        raise UsageError(*(_as_option(fault) for fault in error.faults)) from error
    except (TypeError, ValueError, AttributeError) as error:  # a value of another type, which only a file can hold
        if file is None:
            raise
        raise UsageError(f"{file}: a value has the wrong type ({error})") from error


def read_config_file(path: str) -> dict[str, Any]:
    """The options in a JSON or TOML file; `UsageError` if it cannot be read."""
    place = Path(path).expanduser()
    readers: dict[str, Callable[[str], Any]] = {".json": json.loads, ".toml": tomllib.loads}
    if place.suffix.lower() not in readers:
        raise UsageError(f"--config: '{path}' is of an unknown format; expected a .json or .toml file")
    try:
        values = readers[place.suffix.lower()](place.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config: '{path}' cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UsageError(f"--config: '{path}' does not parse: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"--config: '{path}' holds a {type(values).__name__}; expected an object of options")
    return values


def _as_option(fault: Fault | str) -> str:
    """The fault with the option's name where the config's field stood."""
    if isinstance(fault, str):
        return fault
    found = re.fullmatch(r"\w+(?:\.(?:lora|baseline))?\.(\w+)(.*)|\w+ option '(\w+)'", fault.where)
    if found is None:
        return str(fault)
    name = option_name(found[1] or found[3]) + (found[2] or "")
    return str(Fault(name, fault.got, fault.expected, fault.remedy))
