"""Compare tuning methods, sweep ranks and targets: many runs of the one training loop, told apart from noise.

Each name is imported when it is first used: the configs alone, which the command line's help reads, load no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deltaw.compare.config import CompareConfig, SweepConfig
    from deltaw.compare.studies import StudyResult, compare, sweep

__all__ = ["CompareConfig", "StudyResult", "SweepConfig", "compare", "sweep"]

_HOME = {"CompareConfig": "config", "StudyResult": "studies", "SweepConfig": "config", "compare": "studies",
         "sweep": "studies"}


def __getattr__(name: str) -> object:
    """The object of this name, imported now and kept."""
    if name not in _HOME:
        raise AttributeError(f"module 'deltaw.compare' has no attribute '{name}'")
    value = getattr(import_module(f"deltaw.compare.{_HOME[name]}"), name)
    globals()[name] = value
    return value
