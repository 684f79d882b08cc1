"""Readers of columnar data: a Parquet file, and a data set on the Hugging Face Hub."""

from __future__ import annotations

import bisect
from pathlib import Path
from typing import Any

from deltaw.data.source import Row, Source
from deltaw.errors import DataError, Fault, MissingDependencyError, near

SPLIT_NAMES: dict[str, tuple[str, ...]] = {
    "train": ("train",), "valid": ("valid", "validation", "dev", "val"), "test": ("test",),
}
"""The splits, and what files and data sets call them."""


class Parquet(Source):
    """A Parquet file, read by row groups; the one in use is held in memory."""

    def __init__(self, path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        self.name = str(path)
        try:
            self._file = pyarrow.parquet.ParquetFile(path, memory_map=True)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(Fault(self.name, f"is not a Parquet file: {str(error).splitlines()[0]}")) from error
        self.columns = tuple(self._file.schema_arrow.names)
        facts = self._file.metadata
        self._starts = [0]
        for group in range(facts.num_row_groups):
            self._starts.append(self._starts[-1] + facts.row_group(group).num_rows)
        if not len(self):
            raise DataError(Fault(self.name, "is empty", "at least one row"))
        self._held: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        return self._starts[-1]

    def _where(self, index: int) -> str:
        return f"{self.name}: row {index + 1}"

    def _read(self, start: int, stop: int) -> list[Row]:
        rows: list[Row] = []
        at = start
        while at < stop:
            group = bisect.bisect_right(self._starts, at) - 1
            end = min(stop, self._starts[group + 1])
            part = self._group(group).slice(at - self._starts[group], end - at).to_pylist()
            rows += [Row(values, self.where(at + i)) for i, values in enumerate(part)]
            at = end
        return rows

    def _group(self, group: int) -> Any:
        import pyarrow

        held, table = self._held
        if held != group:
            try:
                table = self._file.read_row_group(group)
            except (pyarrow.ArrowException, OSError) as error:
                raise DataError(Fault(f"{self.name}: row group {group + 1}", f"is damaged: {error}")) from error
            self._held = (group, table)
        return table


class HubTable(Source):
    """One split of a Hub data set "owner/name", or "owner/name:configuration", as `datasets` keeps it on disk."""

    def __init__(self, name: str, split: str) -> None:
        try:
            import datasets
        except ImportError as error:
            raise MissingDependencyError(Fault(f"data '{name}'", "a Hub data set needs the package datasets",
                                               remedy="Install it: pip install 'deltaw[hub-data]'")) from error
        repo, _, configuration = name.partition(":")
        try:
            available = datasets.get_dataset_split_names(repo, configuration or None)
            chosen = next((alias for alias in SPLIT_NAMES.get(split, (split,)) if alias in available), None)
            if chosen is not None:
                self._table = datasets.load_dataset(repo, configuration or None, split=chosen)
        except Exception as error:  # a builder fails in its own way; so does the network
            raise DataError(Fault(f"data '{name}'", "is neither a file or folder here nor a Hub data set that can be "
                                  f"read ({str(error).strip().splitlines()[0]})",
                                  "a data file, a folder or a Hub id")) from error
        if chosen is None:
            raise DataError(Fault(f"data '{name}'", f"has no split '{split}'", "one of " + ", ".join(available),
                                  near(split, available)))
        self.name = f"{name}[{chosen}]"
        self.columns = tuple(self._table.column_names)
        label = self._table.features.get("label")
        if isinstance(label, datasets.ClassLabel):
            self.label_names = tuple(label.names)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def _where(self, index: int) -> str:
        return f"{self.name}: row {index + 1}"

    def _read(self, start: int, stop: int) -> list[Row]:
        columns = self._table[start:stop]
        return [Row({name: columns[name][i] for name in self.columns}, self.where(start + i))
                for i in range(stop - start)]
