"""What a reader of examples gives: rows by number, each with the place it came from; and a log of what is wrong.

A `Source` keeps the places of its rows and not the rows, so that a data set may be larger than memory. Every row
carries `where` (file and line), which each later complaint about it repeats.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaw.errors import DataError, Fault

SHOWN_FAULTS = 20
"""How many faults of a data set are listed one by one; the others are counted."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was read."""

    values: Mapping[str, Any]
    """The row's columns."""
    where: str
    """The file and line it came from."""


class Source(ABC):
    """Rows that can be read in any order, from where they lie."""

    name: str
    """The path or id, for messages."""
    folder: Path = Path()
    """Where relative paths in its rows begin: the folder of its file, else the current one."""
    columns: tuple[str, ...]
    """Every column that some row has, in order of appearance."""
    label_names: tuple[str, ...] | None = None
    """The names of the classes, where the data set itself states them."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of rows."""

    @abstractmethod
    def _read(self, start: int, stop: int) -> list[Row]:
        """The rows of a range that lies within the data set."""

    @abstractmethod
    def _where(self, index: int) -> str:
        """The place of a row that exists."""

    def read(self, start: int, stop: int) -> list[Row]:
        """The rows from `start` up to, not including, `stop`; fewer where the data set ends before."""
        return self._read(max(start, 0), min(stop, len(self)))

    def where(self, index: int) -> str:
        """The file and line of a row, without reading it."""
        return self._where(self._checked(index))

    def __getitem__(self, index: int) -> Row:
        """The row with this number; negative ones count from the end."""
        at = self._checked(index)
        return self._read(at, at + 1)[0]

    def _checked(self, index: int) -> int:
        at = index + len(self) if index < 0 else index
        if not 0 <= at < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return at


class InMemory(Source):
    """Rows that are Python mappings already."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], name: str = "rows") -> None:
        if not rows:
            raise DataError(Fault(name, "is empty", "at least one row"))
        log = FaultLog()
        for i, row in enumerate(rows):
            if not isinstance(row, Mapping):
                log.add(Fault(f"{name}: row {i + 1}", f"is {type(row).__name__}", "an object with named columns"))
        log.raise_if_any()
        self.name = name
        self._rows = rows
        self.columns = tuple(dict.fromkeys(key for row in rows for key in row))

    def __len__(self) -> int:
        return len(self._rows)

    def _read(self, start: int, stop: int) -> list[Row]:
        return [Row(self._rows[i], self.where(i)) for i in range(start, stop)]

    def _where(self, index: int) -> str:
        return f"{self.name}: row {index + 1}"


class Joined(Source):
    """Several sources one after the other, such as the shards of a data set."""

    def __init__(self, parts: Sequence[Source], name: str) -> None:
        self.name = name
        self.folder = parts[0].folder
        self._parts = tuple(parts)
        self._starts = [0]
        for part in parts:
            self._starts.append(self._starts[-1] + len(part))
        self.columns = tuple(dict.fromkeys(column for part in parts for column in part.columns))

    def __len__(self) -> int:
        return self._starts[-1]

    def _read(self, start: int, stop: int) -> list[Row]:
        rows: list[Row] = []
        for first, part in zip(self._starts, self._parts, strict=False):
            begin, end = max(start - first, 0), min(stop - first, len(part))
            if begin < end:
                rows += part.read(begin, end)
        return rows

    def _where(self, index: int) -> str:
        part = next(i for i, end in enumerate(self._starts[1:]) if index < end)
        return self._parts[part].where(index - self._starts[part])


class FaultLog:
    """Collects the faults of a data set: the first twenty are kept, all are counted."""

    def __init__(self) -> None:
        self.count = 0
        self._kept: list[Fault | str] = []

    def add(self, *faults: Fault | str) -> None:
        """Note these faults."""
        self._kept.extend(faults[: SHOWN_FAULTS - len(self._kept)])
        self.count += len(faults)

    def raise_if_any(self) -> None:
        """Raise a `DataError` of all faults noted so far, if there are any."""
        if self.count:
            rest = self.count - len(self._kept)
            more = [f"... and {rest} more like these"] if rest else []
            raise DataError(*self._kept, *more)
