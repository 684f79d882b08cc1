"""The optional libraries of the figures, with what to install where one is missing."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from deltaw.errors import Fault, MissingDependencyError


def needed(module: str, figure: str) -> Any:
    """A module of an optional library; MissingDependencyError names the figure that asks for it."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingDependencyError(Fault(f"the figure {figure}", f"needs {package}, which is not installed",
                                           remedy="Install it: pip install 'deltaw[metrics]'")) from error
