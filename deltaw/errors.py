"""Every exception that deltaw raises for a user's fault.

    DeltawError
    ├── ConfigError            an option is unknown, malformed or out of range         (also ValueError)
    │   ├── TargetError        a target pattern matches nothing, or nothing fits it
    │   └── RankError          the rank is impossible for a site
    ├── DataError              a file or row of examples cannot be used                (also ValueError)
    ├── BaseModelError         the base cannot be loaded, or lacks what the task needs (also ValueError)
    ├── AdapterFileError       an adapter folder is missing, damaged, hostile or unsafe (also ValueError)
    ├── BaseMismatchError      an adapter was made for another base                    (also ValueError)
    ├── StateError             the call does not fit the model's present state         (also RuntimeError)
    │   └── RoutingError       the rows of a batch cannot be given to adapters
    ├── TrainingError          a run cannot go on                                      (also RuntimeError)
    │   ├── DoctorError        a check found that the run learns nothing or harms the base
    │   └── NonFiniteError     a loss or gradient is NaN or infinite
    └── MissingDependencyError an optional package is not installed                    (also ImportError)

Each error carries `faults`: all that is wrong, not only the first. A `Fault` says where, what was got, what was
expected and what to do about it. `assert` is kept for deltaw's own bugs.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong: `where: got ...; expected .... remedy`."""

    where: str
    got: str
    expected: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: {self.got}"
        if self.expected:
            text += f"; expected {self.expected}"
        return f"{text}. {self.remedy}" if self.remedy else text


class DeltawError(Exception):
    """Base of all. `faults` holds every fault found; the message has one line for each."""

    def __init__(self, *faults: Fault | str) -> None:
        self.faults: tuple[Fault | str, ...] = faults
        super().__init__(*faults)

    def __str__(self) -> str:
        if len(self.faults) == 1:
            return str(self.faults[0])
        return f"{len(self.faults)} faults:\n" + "\n".join(f"  {fault}" for fault in self.faults)


class ConfigError(DeltawError, ValueError):
    """An option is unknown, malformed or out of range."""


class TargetError(ConfigError):
    """A target pattern matches nothing in the model, or matches what cannot be adapted."""


class RankError(ConfigError):
    """The rank is impossible for a site."""


class DataError(DeltawError, ValueError):
    """A file or row of examples cannot be used; `where` names the file and line."""


class BaseModelError(DeltawError, ValueError):
    """The base model cannot be loaded, or lacks what the task needs."""


class AdapterFileError(DeltawError, ValueError):
    """An adapter folder is missing, damaged, hostile or in an unsafe format."""


class BaseMismatchError(DeltawError, ValueError):
    """An adapter was made for another base than the one it is loaded on."""


class StateError(DeltawError, RuntimeError):
    """The call does not fit the model's present state (attached, merged, routed)."""


class RoutingError(StateError):
    """The rows of a batch cannot be given to adapters."""


class TrainingError(DeltawError, RuntimeError):
    """A training run cannot go on."""


class DoctorError(TrainingError):
    """A check during training found that it learns nothing, or harms the base."""


class NonFiniteError(TrainingError):
    """A loss or a gradient is NaN or infinite."""


class MissingDependencyError(DeltawError, ImportError):
    """An optional package is not installed; the message has the install command."""


def near(word: str, known: Iterable[str], *, limit: int = 3) -> str:
    """A "did you mean" sentence for `word`, or an empty string when nothing is close.

    >>> near("q_porj", ["q_proj", "o_proj", "mlp"])
    'Did you mean q_proj, o_proj?'
    """
    matches = difflib.get_close_matches(word, list(dict.fromkeys(known)), n=limit, cutoff=0.6)
    return f"Did you mean {', '.join(matches)}?" if matches else ""
