"""Names of a package that are imported when they are first used, so that its configs alone load no torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module


def exported(package: str, home: Mapping[str, str]) -> Callable[[str], object]:
    """The `__getattr__` of a package whose public names live in its files: name -> file, without the package."""
    def find(name: str) -> object:
        if name not in home:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        value = getattr(import_module(f"{package}.{home[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return find
