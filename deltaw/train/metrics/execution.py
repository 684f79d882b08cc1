"""Execution accuracy of SQL answers: the share that return what the expected query returns, each from its own data.

A row of the data names what to ask in one of two columns:

    database    an SQLite file; a relative path begins at the folder of the data
    table       {"header": [...], "rows": [[...], ...]}, as in WikiSQL's files, or this as JSON text; queries call it
                `table`, or what its "name" says. Text is compared without case there, as WikiSQL compares it

Queries can do nothing but read, and have five seconds each. Rows of the result may come in any order, unless the
expected query has an ORDER BY. An answer that fails, or takes too long, is wrong; an expected query that does so is a
fault of the data.
"""

from __future__ import annotations

import json
import re
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaw.data.source import FaultLog
from deltaw.errors import Fault

if TYPE_CHECKING:
    from deltaw.data import EncodedData

QUERY_SECONDS = 5.0
_STEPS_BETWEEN_LOOKS = 10_000
_LONGEST_VALUE = 1 << 24
_READS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
_FAILURES = (sqlite3.Error, sqlite3.Warning, OverflowError, ValueError)
"""What a query that is none, or text that no database takes, raises."""
_FORM = '{"header": [names], "rows": [[values], ...]}'

Rows = list[tuple[Any, ...]]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table that stands in the data."""

    header: tuple[str, ...]
    """The names of its columns."""
    rows: tuple[tuple[Any, ...], ...]
    """Its rows: text, numbers or None."""
    name: str = "table"
    """What queries call it."""


def execution_accuracy(predictions: Sequence[str], references: Sequence[str],
                       databases: Sequence[Path | Table]) -> float:
    """The share of queries that return what their reference returns, 0 to 1; each is asked of its own data."""
    right = 0
    for prediction, reference, database in zip(predictions, references, databases, strict=True):
        with opened(database) as connection:
            wanted = ask(connection, reference)
            try:
                found = ask(connection, prediction, most=len(wanted) + 1)
            except _FAILURES:
                continue
        right += found == wanted if "order by" in reference.lower() else Counter(found) == Counter(wanted)
    return right / len(references)


def databases_of(data: EncodedData, rows: Sequence[int]) -> list[Path | Table]:
    """What these rows' queries are asked of, after their expected answers were tried on it.

    Raises DataError with every row (twenty are listed) that names none, or whose expected answer fails.
    """
    log, found = FaultLog(), list[Path | Table]()
    for row in rows:
        prompt = data.prompt(row)
        try:
            named = _named(data.value(row, "database"), data.value(row, "table"), data.source.folder)
        except ValueError as error:
            log.add(Fault(prompt.where, str(error), f"a column 'database' with an SQLite file, or 'table' with {_FORM}",
                          "The figure execution needs one; other columns: columns database=NAME or table=NAME"))
            continue
        try:
            with opened(named) as connection:
                ask(connection, prompt.answer)
        except _FAILURES as error:
            log.add(Fault(prompt.where, f"its answer {prompt.answer!r} fails: {error}", "a query that works there"))
        found.append(named)
    log.raise_if_any()
    return found


@contextmanager
def opened(database: Path | Table) -> Iterator[sqlite3.Connection]:
    """A connection that can read and nothing else."""
    place = f"{database.resolve().as_uri()}?mode=ro" if isinstance(database, Path) else ":memory:"
    with closing(sqlite3.connect(place, uri=True, isolation_level=None)) as connection:
        if isinstance(database, Table):
            _fill(connection, database)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST_VALUE)
        connection.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in _READS else sqlite3.SQLITE_DENY)
        yield connection


def ask(connection: sqlite3.Connection, query: str, *, most: int | None = None) -> Rows:
    """What a query returns, `most` rows of it; sqlite3's errors where it fails or takes too long.

    TABLE, which is a word of the language, may be a table's name.
    """
    end = time.monotonic() + QUERY_SECONDS
    connection.set_progress_handler(lambda: time.monotonic() > end, _STEPS_BETWEEN_LOOKS)
    cursor = connection.execute(re.sub(r"\bfrom\s+table\b", 'FROM "table"', query, flags=re.IGNORECASE))
    if cursor.description is None:
        raise sqlite3.ProgrammingError("it asks for nothing")
    return cursor.fetchall() if most is None else cursor.fetchmany(most)


def _fill(connection: sqlite3.Connection, table: Table) -> None:
    name, columns = _quoted(table.name), []
    for i, column in enumerate(table.header):
        is_text = any(isinstance(row[i], str) for row in table.rows)
        columns.append(f"{_quoted(column)} {'TEXT COLLATE NOCASE' if is_text else 'NUMERIC'}")
    connection.execute(f"CREATE TABLE {name} ({', '.join(columns)})")
    connection.executemany(f"INSERT INTO {name} VALUES ({', '.join('?' * len(columns))})", table.rows)


def _named(database: object, table: object, folder: Path) -> Path | Table:
    """The database or table that a row names; ValueError with what is wrong where it names none that is there."""
    if isinstance(database, str) and database.strip():
        path = folder / Path(database).expanduser()
        if not path.is_file():
            raise ValueError(f"names the database '{database}', and there is no file {path}")
        return path
    if isinstance(table, str) and table.strip():
        try:
            table = json.loads(table)
        except ValueError as error:
            raise ValueError(f"has a table that is not JSON: {error}") from error
    if not table:
        raise ValueError("names no database and has no table")
    if not isinstance(table, Mapping):
        raise ValueError(f"has a table that is {type(table).__name__}")
    return _table(table)


def _table(given: Mapping[str, Any]) -> Table:
    header, rows = given.get("header"), given.get("rows")
    if not isinstance(header, Sequence) or isinstance(header, str) or not header \
            or not all(isinstance(name, str) and name for name in header):
        raise ValueError("has a table whose header is no list of names")
    twice = [name for name, count in Counter(name.lower() for name in header).items() if count > 1]
    if twice:
        raise ValueError(f"has a table with two columns '{twice[0]}'")
    if not isinstance(rows, Sequence) or isinstance(rows, str) or not all(
            isinstance(row, Sequence) and not isinstance(row, str) and len(row) == len(header)
            and all(value is None or isinstance(value, (str, int, float)) for value in row) for row in rows):
        raise ValueError(f"has a table whose rows are not lists of {len(header)} texts and numbers")
    name = given.get("name")
    return Table(header=tuple(header), rows=tuple(map(tuple, rows)),
                 name=name if isinstance(name, str) and name else "table")


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
