"""Modules with another forward for the length of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def exchanged(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """These modules with these forwards; afterwards each has again what it had, of its own or of its class."""
    own = {module: module.__dict__.get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, before in own.items():
            del module.__dict__["forward"]
            if before is not None:
                module.forward = before
