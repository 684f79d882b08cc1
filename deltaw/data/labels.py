"""The classes of a labelled data set: collected from its rows, or given and checked."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from deltaw.data.source import FaultLog
from deltaw.errors import DataError, Fault, near

_SHOWN = 8


class Classes:
    """Numbers the labels of rows as they come.

    With given `names` a label is one of them, or its number when no name is itself a number. Without, the names are
    those that occur, sorted (by value when all are numbers), once all rows have been seen.
    """

    def __init__(self, names: Sequence[str] | None) -> None:
        self._given = None if names is None else tuple(str(name) for name in names)
        self._index: dict[str, int] = {name: i for i, name in enumerate(self._given or ())}
        self._numbered = self._given is not None and not any(_is_number(name) for name in self._given)
        self._seen = array("q")

    def add(self, label: str, where: str, log: FaultLog) -> None:
        """Note the label of the next row; one outside the given names is logged as a fault."""
        if self._given is None:
            self._seen.append(self._index.setdefault(label, len(self._index)))
            return
        index = self._index.get(label, -1)
        if index < 0 and self._numbered and _is_number(label) and 0 <= int(label) < len(self._given):
            index = int(label)
        if index < 0:
            names = ", ".join(self._given[:_SHOWN]) + (", ..." if len(self._given) > _SHOWN else "")
            numbers = f", or 0 to {len(self._given) - 1}" if self._numbered else ""
            log.add(Fault(where, f"label {label!r} is not one of the {len(self._given)} classes", names + numbers,
                          near(label, self._given)))
        self._seen.append(index)

    def finish(self, name: str) -> tuple[tuple[str, ...], NDArray[np.int64]]:
        """The names of the classes, and the class number of each row in order."""
        seen = np.asarray(self._seen, dtype=np.int64)
        if self._given is not None:
            return self._given, seen
        found = list(self._index)
        if len(found) < 2:
            raise DataError(Fault(name, f"has the one label {found[0]!r} in every row", "at least two classes"))
        numeric = all(_is_number(label) for label in found)
        ordered = sorted(found, key=(lambda label: int(label)) if numeric else None)
        rank = {label: i for i, label in enumerate(ordered)}
        return tuple(ordered), np.array([rank[label] for label in found], dtype=np.int64)[seen]


def _is_number(label: str) -> bool:
    return label.removeprefix("-").isdecimal() and label.isascii()
