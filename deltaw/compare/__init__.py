"""Compare tuning methods, sweep ranks and targets: many runs of the one training loop, told apart from noise.

Each name is imported when it is first used: the configs alone, which the command line's help reads, load no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltaw.exports import exported

if TYPE_CHECKING:
    from deltaw.compare.config import CompareConfig, SweepConfig
    from deltaw.compare.studies import StudyResult, compare, sweep

__all__ = ["CompareConfig", "StudyResult", "SweepConfig", "compare", "sweep"]

_HOME = {"CompareConfig": "config", "StudyResult": "studies", "SweepConfig": "config", "compare": "studies",
         "sweep": "studies"}

__getattr__ = exported(__name__, _HOME)
