"""The folder that a merge writes: whole or not at all, with all that a model folder holds beside its weights."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deltaw.errors import ConfigError, Fault
from deltaw.merge.checkpoint import INDEX

_COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*")
RECORD = "deltaw_merge.json"
"""What a merged folder says of its weights."""
_NOT_COPIED = {INDEX, RECORD, "config.json", "adapter_config.json", "deltaw.json", "trainer_state.json"}
_TEMPLATES = "additional_chat_templates"
_STALE_S = 6 * 3600


def copy_companions(folder: Path, new: Path) -> list[str]:
    """Copy what a model folder holds beside its weights: tokenizer, generation config, templates, licence, code."""
    paths = {path for pattern in _COMPANIONS for path in folder.glob(pattern) if path.is_file()}
    copied = []
    for path in sorted(paths):
        if path.name not in _NOT_COPIED and not path.name.endswith(".index.json"):
            shutil.copyfile(path, new / path.name)
            copied.append(path.name)
    if (folder / _TEMPLATES).is_dir():
        shutil.copytree(folder / _TEMPLATES, new / _TEMPLATES)
        copied += [f"{_TEMPLATES}/{path.name}" for path in sorted((folder / _TEMPLATES).iterdir())]
    return copied


def usable_target(out_dir: Path, base: Path, *, overwrite: bool) -> Path:
    """The absolute path to write to, if it may be written."""
    target, where = out_dir.expanduser().resolve(), f"out_dir '{out_dir}'"
    base = base.resolve()
    if target == base or target in base.parents or base in target.parents:
        raise ConfigError(Fault(where, "is, holds or lies in the base's own folder", "a folder of its own"))
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return target
    if not target.is_dir():
        raise ConfigError(Fault(where, "is a file", "a new folder"))
    if not overwrite:
        raise ConfigError(Fault(where, "exists", "a new folder", "Choose another, or pass overwrite=True"))
    if not (target / "config.json").is_file():
        raise ConfigError(Fault(where, "holds something else than a model", "a model folder to overwrite",
                                "Choose another, or delete it yourself"))
    return target


@contextmanager
def new_folder(target: Path, needed: int) -> Iterator[Path]:
    """A folder beside the target, renamed to it when the block is done, and gone if it fails."""
    new = target.with_name(f".{target.name}.{secrets.token_hex(4)}.merging")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        if shutil.disk_usage(target.parent).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        new.mkdir()
        yield new
        _move_in(new, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(target.parent).free
            raise ConfigError(Fault(f"out_dir '{target}'", f"the disk is full: {free} bytes are free",
                                    f"{needed} bytes and some more", "Free some space; nothing was changed")) from error
        raise ConfigError(Fault(f"out_dir '{target}'", f"cannot be written ({error})", "a writable place")) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _move_in(new: Path, target: Path) -> None:
    """Rename the finished folder into place; an old one stands aside until that is done."""
    if not target.exists():
        new.rename(target)
        return
    aside = new.with_suffix(".old")
    target.rename(aside)
    try:
        new.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _sweep(target: Path) -> None:
    """Remove what killed merges into this target left; a running one is younger than six hours."""
    for left in target.parent.glob(f".{target.name}.*.merging"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _STALE_S:
                shutil.rmtree(left, ignore_errors=True)


