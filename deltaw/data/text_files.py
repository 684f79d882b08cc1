"""Readers of text files: JSON Lines, a JSON list, comma- or tab-separated tables, and plain text.

Opening reads the file once from start to end, checks every row and keeps the place of each (24 bytes); the rows
themselves stay on disk, mapped into memory by the operating system. Only a JSON list, which has no rows until all of
it is parsed, is held in memory.
"""

from __future__ import annotations

import csv
import io
import json
import mmap
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from deltaw.data.source import FaultLog, InMemory, Row, Source
from deltaw.errors import DataError, Fault

_BOM = b"\xef\xbb\xbf"
_LONGEST_FIELD = 2**31 - 1  # csv refuses fields above 128 KiB unless told otherwise


class _MappedRows(Source):
    """A file whose rows are ranges of bytes."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        if path.stat().st_size == 0:
            raise DataError(Fault(self.name, "is empty", "at least one row"))
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._starts, self._ends, self._lines = array("q"), array("q"), array("q")

    def __len__(self) -> int:
        return len(self._starts)

    def _where(self, index: int) -> str:
        return f"{self.name}:{self._lines[index]}"

    def _read(self, start: int, stop: int) -> list[Row]:
        return [Row(self._parse(self._bytes[self._starts[i]:self._ends[i]].decode("utf-8")), self.where(i))
                for i in range(start, stop)]

    def _parse(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def _keep(self, start: int, end: int, line: int) -> None:
        self._starts.append(start)
        self._ends.append(end)
        self._lines.append(line)


class JsonLines(_MappedRows):
    """One JSON object on each line; blank lines are skipped."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        log, columns = FaultLog(), dict[str, None]()
        lines = _Lines(self._bytes)
        while True:
            start = lines.end
            try:
                text = next(lines)
                if text.isspace():
                    continue
                row = json.loads(text)
            except StopIteration:
                break
            except UnicodeDecodeError as error:
                log.add(_encoding_fault(f"{path}:{lines.number}", error))
                continue
            except (ValueError, RecursionError) as error:
                log.add(Fault(f"{path}:{lines.number}", f"is not JSON: {error}", "one JSON object on the line"))
                continue
            if not isinstance(row, dict):
                log.add(Fault(f"{path}:{lines.number}", f"is a JSON {type(row).__name__}", "a JSON object"))
                continue
            columns.update(dict.fromkeys(row))
            self._keep(start, lines.end, lines.number)
        log.raise_if_any()
        if not len(self):
            raise DataError(Fault(self.name, "holds only blank lines", "at least one row"))
        self.columns = tuple(columns)

    def _parse(self, text: str) -> dict[str, Any]:
        row: dict[str, Any] = json.loads(text)
        return row


class Delimited(_MappedRows):
    """A table with its columns' names on the first line; quoted cells may hold delimiters and line breaks.

    Some tab-separated files use quotes as plain characters. One in which quoting does not work out, but does without
    it, is read without.
    """

    def __init__(self, path: Path, delimiter: str) -> None:
        super().__init__(path)
        self._delimiter = delimiter
        self._quoting: Literal[0, 3] = csv.QUOTE_MINIMAL
        csv.field_size_limit(_LONGEST_FIELD)
        log = self._index()
        if log.count and delimiter == "\t":
            self._quoting = csv.QUOTE_NONE
            plain = self._index()
            log = log if plain.count else plain
        log.raise_if_any()
        if not len(self):
            raise DataError(Fault(self.name, "has no rows", "a line of column names, and rows below it"))

    def _index(self) -> FaultLog:
        """Find the header and the place of every record; what is wrong with them comes back."""
        log, lines = FaultLog(), _Lines(self._bytes)
        self._starts, self._ends, self._lines = array("q"), array("q"), array("q")
        self.columns = ()
        reader = self._reader(lines)
        while True:
            start, line = lines.end, lines.number + 1
            try:
                record = next(reader)
            except StopIteration:
                return log
            except UnicodeDecodeError as error:
                log.add(_encoding_fault(f"{self.name}:{lines.number}", error))
                continue
            except csv.Error as error:
                log.add(Fault(f"{self.name}:{line}", f"is not a record: {error}", "cells with closed quotes"))
                continue
            if not record:
                continue
            if not self.columns:
                self.columns = tuple(record)
                twice = sorted({name for name in record if record.count(name) > 1})
                if twice:
                    log.add(Fault(f"{self.name}:{line}", f"names a column twice: {twice[0]!r}", "distinct names"))
            elif len(record) != len(self.columns):
                log.add(Fault(f"{self.name}:{line}", f"has {len(record)} cells",
                              f"{len(self.columns)}, as on the first line"))
            else:
                self._keep(start, lines.end, line)

    def _reader(self, lines: Iterator[str]) -> Any:
        return csv.reader(lines, delimiter=self._delimiter, quoting=self._quoting, strict=True)

    def _parse(self, text: str) -> dict[str, Any]:
        return dict(zip(self.columns, next(self._reader(io.StringIO(text, newline=""))), strict=True))


class Paragraphs(_MappedRows):
    """Plain text: what stands between blank lines is a row with the one column `text`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        log, lines, first = FaultLog(), _Lines(self._bytes), 0
        while True:
            start = lines.end
            try:
                blank = not next(lines).strip()
            except StopIteration:
                break
            except UnicodeDecodeError as error:
                log.add(_encoding_fault(f"{path}:{lines.number}", error))
                continue
            if blank:
                first = 0
            elif first:
                self._ends[-1] = lines.end
            else:
                first = lines.number
                self._keep(start, lines.end, first)
        log.raise_if_any()
        if not len(self):
            raise DataError(Fault(self.name, "holds only blank lines", "text"))
        self.columns = ("text",)

    def _parse(self, text: str) -> dict[str, Any]:
        return {"text": text.replace("\r\n", "\n").rstrip("\n")}


class _Lines:
    """The lines of a mapped file as text, with the number and the end of the last one; goes on after an error."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.end = len(_BOM) if data[:3] == _BOM else 0
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        start, size = self.end, len(self._data)
        if start >= size:
            raise StopIteration
        found = self._data.find(b"\n", start)
        self.end = size if found < 0 else found + 1
        self.number += 1
        return self._data[start:self.end].decode("utf-8")


def open_json(path: Path) -> Source:
    """A .json file: a list of objects, held in memory, or JSON Lines under that name."""
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(_BOM).lstrip()
    if not head.startswith(b"["):
        try:
            return JsonLines(path)
        except DataError as error:
            if _is_one_object(path):
                raise DataError(Fault(str(path), "holds one JSON object", "a list of objects, or one object a line",
                                      "Save its rows as a list: [{...}, {...}]")) from error
            raise
    try:
        rows = json.loads(path.read_bytes().removeprefix(_BOM).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(_encoding_fault(str(path), error)) from error
    except json.JSONDecodeError as error:
        raise DataError(Fault(f"{path}:{error.lineno}", f"is not JSON: {error.msg}", "a list of objects")) from error
    except RecursionError as error:
        raise DataError(Fault(str(path), "is nested too deeply", "a list of objects")) from error
    return InMemory(rows, str(path))


def _is_one_object(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except (ValueError, RecursionError):
        return False


def _encoding_fault(where: str, error: UnicodeDecodeError) -> Fault:
    bad = error.object[error.start]
    return Fault(where, f"byte {error.start + 1} (0x{bad:02x}) is not UTF-8", "UTF-8 text", "Convert the file to UTF-8")
