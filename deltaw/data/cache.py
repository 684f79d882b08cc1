"""The tokens of a data set, kept on disk by content, so that the next run over the same data need not make them.

    DELTAW_HOME/tokens/<key>/ids.npy, marks.npy, ends.npy, rows.npy, (classes.npy,) facts.json

The key is a hash of everything that decides the tokens: the content of the files, the whole tokenizer, what its chat
template writes today (some write the date), every option of the encoder, and the versions of what encodes. An entry
appears by one rename and is believed only if each column has the SHA-256 that was written down; one that is damaged
is made again. Columns are mapped from the disk and not read into memory. What nobody used for 30 days is deleted.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from deltaw.bases.template import render
from deltaw.core.home import home
from deltaw.core.kept import keep
from deltaw.data.columns import Columns, EncodeStats
from deltaw.data.encode import Encoder
from deltaw.data.rows import Layout
from deltaw.errors import DataError

FORMAT = 1
"""Raise it whenever the same rows become other tokens or columns."""
SMALLEST = 1 << 20
"""Bytes of data below which tokenising takes no longer than looking up."""
_UNUSED_S = 30 * 24 * 3600
_FACTS = "facts.json"
_PROBES: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}],
    [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}])


@dataclass(frozen=True, slots=True)
class Tokens:
    """A tokenised data set apart from its rows."""

    columns: Columns
    """All examples."""
    stats: EncodeStats
    """What became of the rows."""
    label_names: tuple[str, ...] | None
    """The names of the classes of labelled data."""


class TokenCache:
    """The place of one data set's tokens; without files, or with few bytes in them, nothing is kept."""

    def __init__(self, files: Sequence[Path], encoder: Encoder, layout: Layout, labels: Sequence[str] | None) -> None:
        self.files = files if sum(path.stat().st_size for path in files) >= SMALLEST else ()
        self.folder: Path | None = None
        self._seen = _stamps(self.files)
        if self.files:
            facts = {"format": FORMAT, "files": [(p.suffix.lower(), _sha256(p)) for p in self.files],
                     "encoder": _encoder(encoder), "layout": asdict(layout), "labels": labels,
                     "versions": {name: version(name) for name in ("tokenizers", "transformers")}}
            self.folder = home() / "tokens" / _hash(facts)

    def read(self, rows: int) -> Tokens | None:
        """The tokens, if they are kept, whole, and of as many rows as the data has."""
        if self.folder is None or not self.folder.is_dir():
            return None
        tokens = _read(self.folder)
        if tokens is None or tokens.stats.rows != rows:
            shutil.rmtree(self.folder, ignore_errors=True)
            return None
        with suppress(OSError):
            os.utime(self.folder)  # used today
        return tokens

    def write(self, tokens: Tokens) -> None:
        """Keep the tokens, unless the files changed while they were read; a warning where there is no room."""
        if self.folder is None or _stamps(self.files) != self._seen:
            return
        try:
            keep(self.folder, lambda partial: _write(partial, tokens))
            _forget(self.folder.parent)
        except OSError as error:
            warnings.warn(f"The tokens of {self.files[0]} could not be kept in {self.folder.parent} ({error}); set "
                          "DELTAW_HOME to a folder with room, or turn cache_data off", stacklevel=3)


def _write(folder: Path, tokens: Tokens) -> None:
    folder.mkdir()
    digests = {}
    for field in fields(Columns):
        column = getattr(tokens.columns, field.name)
        if column is not None:
            file = folder / f"{field.name}.npy"
            np.save(file, column, allow_pickle=False)
            digests[field.name] = _sha256(file)
    facts = {"stats": asdict(tokens.stats), "labels": tokens.label_names, "sha256": digests}
    (folder / _FACTS).write_text(json.dumps(facts | {"check": _hash(facts)}), encoding="utf-8")


def _read(folder: Path) -> Tokens | None:
    """What `_write` wrote; None if a byte of it is different."""
    try:
        facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        check, digests = facts.pop("check"), facts["sha256"]
        if check != _hash(facts) or any(_sha256(folder / f"{name}.npy") != d for name, d in digests.items()):
            return None
        columns = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in digests}
        labels = facts["labels"]
        return Tokens(Columns(**columns), EncodeStats(**facts["stats"]), None if labels is None else tuple(labels))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _encoder(encoder: Encoder) -> dict[str, Any]:
    """All that makes this encoder another than the next one, as JSON values."""
    tokenizer = encoder.tokenizer
    inner = json.loads(tokenizer.backend_tokenizer.to_str())
    for last_call in ("truncation", "padding"):
        inner.pop(last_call, None)
    own = {name: getattr(tokenizer, name, None) for name in (
        "eos_token_id", "bos_token_id", "all_special_ids", "truncation_side", "split_special_tokens", "chat_template")}
    return {"tokenizer": inner, "own": own, "rendered": _rendered(tokenizer), "max_length": encoder.max_length,
            "train_on": encoder.train_on, "template": encoder.template}


def _rendered(tokenizer: Any) -> list[str]:
    """What the chat template makes of a few words now."""
    found = []
    for messages in _PROBES if tokenizer.chat_template else ():
        try:
            found.append(render(tokenizer, messages, False) + render(tokenizer, messages[:-1], True))
        except DataError as error:  # a template may have no system turn
            found.append(str(error))
    return found


def _forget(folder: Path) -> None:
    """Delete the entries that nobody has used for long."""
    for entry in folder.iterdir():
        with suppress(OSError):
            if time.time() - entry.stat().st_mtime > _UNUSED_S:
                shutil.rmtree(entry, ignore_errors=True)


def _stamps(files: Sequence[Path]) -> list[tuple[int, int]]:
    return [(facts.st_size, facts.st_mtime_ns) for facts in (path.stat() for path in files)]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
