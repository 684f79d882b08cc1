"""Open data by its path or Hub id, whatever its format.

A file is one split. A folder holds one file for each split (`train.jsonl`, `valid.csv`, ...; `validation`, `dev` and
`val` mean `valid`), or numbered shards of it (`train-00000-of-00002.parquet`). A plain text (`train.txt`) is
read, paragraph by paragraph, where a split has no other file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deltaw.data.source import InMemory, Joined, Source
from deltaw.data.tables import SPLIT_NAMES, HubTable, Parquet
from deltaw.data.text_files import Delimited, JsonLines, Paragraphs, open_json
from deltaw.errors import DataError, Fault, near

PLAIN = ".txt"
READERS: Mapping[str, Callable[[Path], Source]] = {
    ".jsonl": JsonLines, ".ndjson": JsonLines, ".json": open_json,
    ".csv": lambda path: Delimited(path, ","), ".tsv": lambda path: Delimited(path, "\t"), ".parquet": Parquet,
    PLAIN: Paragraphs,
}
"""The reader of each file format, by the end of the name."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?")


def open_source(path: str | Path | Sequence[Mapping[str, Any]], split: str = "train") -> Source:
    """The rows at `path`: a file, a folder's file for `split`, a Hub data set's split, or rows in memory.

    Every row of a text file is parsed once, and a `DataError` lists the bad ones with file and line; the rows are
    then read from disk as they are asked for.

    >>> open_source([{"text": "hello"}])[0].values["text"]
    'hello'
    """
    if not isinstance(path, (str, Path)):
        return InMemory(path)
    place = Path(path).expanduser()
    if place.is_dir():
        files = _split_files(place)
        wanted = _canonical(split)
        if wanted not in files:
            raise DataError(Fault(f"data '{path}'", f"has no file for the split '{split}'",
                                  f"one of {', '.join(f'{wanted}{end}' for end in READERS)}; it has "
                                  + (", ".join(files) or "no split at all")))
        parts = [_open_file(file) for file in files[wanted]]
        return parts[0] if len(parts) == 1 else Joined(parts, f"{place}/{wanted}")
    if place.is_file():
        return _open_file(place)
    name = str(path)
    if place.suffix.lower() in READERS or not _HUB_ID.fullmatch(name):
        siblings = [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else []
        raise DataError(Fault(f"data '{name}'", "no such file or folder", "a data file, a folder or a Hub id",
                              near(place.name, siblings)))
    return HubTable(name, split)


def files_of(path: str | Path | Sequence[Mapping[str, Any]], split: str = "train") -> list[Path]:
    """The files on this machine that hold a split at `path`, in order; none of a Hub data set or rows in memory."""
    place = Path(path).expanduser() if isinstance(path, (str, Path)) else Path()
    if not isinstance(path, (str, Path)) or not place.exists():
        return []
    return [place] if place.is_file() else _split_files(place).get(_canonical(split), [])


def available_splits(path: str | Path | Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Which of train, valid and test there are at `path`; a file or rows in memory are the train split alone.

    For a Hub data set this asks the Hub.
    """
    if not isinstance(path, (str, Path)) or Path(path).expanduser().is_file():
        return ("train",)
    place = Path(path).expanduser()
    if place.is_dir():
        return tuple(_split_files(place))
    return tuple(split for split in SPLIT_NAMES if _hub_has(str(path), split))


def judged_split(path: str | Path | Sequence[Mapping[str, Any]]) -> str:
    """The part of the data at `path` to judge on: test, else valid, else train."""
    there = available_splits(path)
    return next(name for name in ("test", "valid", "train") if name in there)


def _hub_has(name: str, split: str) -> bool:
    try:
        open_source(name, split)
    except DataError:
        if split == "train":
            raise
        return False
    return True


def _canonical(split: str) -> str:
    for name, aliases in SPLIT_NAMES.items():
        if split in aliases:
            return name
    raise DataError(Fault("split", f"got {split!r}", "one of " + ", ".join(SPLIT_NAMES), near(split, SPLIT_NAMES)))


def _split_files(folder: Path) -> dict[str, list[Path]]:
    """The files of each split that the folder has."""
    found: dict[str, list[Path]] = {}
    faults = []
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix.lower() in READERS)
    for split, aliases in SPLIT_NAMES.items():
        names = "|".join(aliases)
        whole = [p for p in files if re.fullmatch(names, p.stem)]
        shards = [p for p in files if re.fullmatch(rf"({names})-\d+-of-\d+", p.stem)]
        if any(p.suffix.lower() != PLAIN for p in [*whole, *shards]):  # a text beside the data says something about it
            whole, shards = ([p for p in listed if p.suffix.lower() != PLAIN] for listed in (whole, shards))
        if len(whole) > 1 or (whole and shards):
            several = ", ".join(p.name for p in [*whole, *shards])
            faults.append(Fault(f"data '{folder}'", f"has several files for '{split}': {several}", "one"))
        elif whole or shards:
            found[split] = whole or shards
    if faults:
        raise DataError(*faults)
    return found


def _open_file(path: Path) -> Source:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(Fault(str(path), f"is of the unknown format '{path.suffix}'", "one of " + ", ".join(READERS),
                              near(path.suffix, READERS)))
    source = reader(path)
    source.folder = path.parent
    return source
