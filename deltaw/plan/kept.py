"""Answers of walks that are kept: those of this machine's plans in a folder, those of published shapes in the package.

    DELTAW_HOME/plan/walks/<key>.json    {"asked": ..., "by": ..., "answer": ..., "check": ...}
    deltaw/plan/walked/<shape>.json.gz   {"by": ..., "answers": {<key>: ...}}, written by `docs/write_walked.py`;
                                         of steps those are forms, for any batch and length (`deltaw.plan.forms`)

A key is a hash of the question. An answer counts only for the versions of torch and transformers that gave it, and in
the folder only for the same files of deltaw. What is damaged, of other versions, or cannot be written, is as if it
were not there. Deleting the folder is all that it takes to start anew.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from deltaw.core.home import home

WALKED = Path(__file__).parent / "walked"
MOST = 1000
"""Answers that are kept in the folder; the oldest go first."""
_OURS = ("core", "bases", "inject", "switch", "plan")
"""Packages of deltaw that a walk runs."""
_DAMAGED = (OSError, ValueError, TypeError, LookupError, AttributeError, EOFError)
_Found = TypeVar("_Found")


def recall(asked: dict[str, Any], source: str, read: Callable[[Any], _Found]) -> _Found | None:
    """The kept answer to a question as `read` makes it, or None. `source` names the base, which may be published."""
    with suppress(*_DAMAGED):
        return read(_from_folder(asked))
    return recall_shipped(asked, source, read)


def recall_shipped(asked: dict[str, Any], source: str, read: Callable[[Any], _Found]) -> _Found | None:
    """The same, of the package's answers alone."""
    with suppress(*_DAMAGED):
        return read(shipped(source)[key(asked)])
    return None


def keep(asked: dict[str, Any], answer: Any) -> Any:
    """Keep an answer, where that can be done; the answer, as JSON has it."""
    answer = json.loads(json.dumps(answer))
    facts = {"asked": asked, "by": {**versions(), "deltaw": _own_files()}, "answer": answer}
    file = _file(asked)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    with suppress(OSError, TypeError):
        file.parent.mkdir(parents=True, exist_ok=True)
        _make_room(file.parent)
        try:
            unfinished.write_text(json.dumps(facts | {"check": _check(facts)}), encoding="utf-8")
            unfinished.replace(file)
        finally:
            unfinished.unlink(missing_ok=True)
    return answer


def folder() -> Path:
    """Where this machine's answers lie."""
    return home() / "plan" / "walks"


def key(asked: dict[str, Any]) -> str:
    """The name of a question."""
    return hashlib.sha256(_text(asked).encode()).hexdigest()[:24]


@cache
def versions() -> dict[str, str]:
    """The libraries that a walk runs; a build for another processor is the same version."""
    return {name: version(name).partition("+")[0] for name in ("torch", "transformers")}


@cache
def shipped(source: str) -> dict[str, Any]:
    """The package's answers on a published shape, by key; none on others, and none of other versions."""
    from deltaw.plan.architectures import ARCHITECTURES

    if source not in ARCHITECTURES:
        return {}
    facts = json.loads(gzip.decompress((WALKED / f"{source}.json.gz").read_bytes()))
    return dict(facts["answers"]) if facts["by"] == versions() else {}


def _from_folder(asked: dict[str, Any]) -> Any:
    facts = json.loads(_file(asked).read_text(encoding="utf-8"))
    check = facts.pop("check")
    if check != _check(facts) or facts["by"] != {**versions(), "deltaw": _own_files()}:
        raise ValueError("damaged, or of other versions")
    return facts["answer"]


def _file(asked: dict[str, Any]) -> Path:
    return folder() / f"{key(asked)}.json"


def _check(facts: dict[str, Any]) -> str:
    return hashlib.sha256(_text(facts).encode()).hexdigest()


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


@cache
def _own_files() -> str:
    """A hash of names, sizes and times of deltaw's own files: an edited step gives other answers."""
    package = Path(__file__).parent.parent
    facts = [(str(file.relative_to(package)), (found := file.stat()).st_size, found.st_mtime_ns)
             for name in _OURS for file in sorted((package / name).rglob("*.py"))]
    return hashlib.sha256(_text(facts).encode()).hexdigest()


def _make_room(where: Path) -> None:
    """Delete the oldest answers where there are too many."""
    files = sorted(where.glob("*.json"), key=lambda file: file.stat().st_mtime)
    for file in files[:max(0, len(files) - MOST + 1)]:
        file.unlink(missing_ok=True)
