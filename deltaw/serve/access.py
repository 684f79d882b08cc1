"""Which folders clients may load adapters from: real folders below one root, and nothing that leads out of it."""

from __future__ import annotations

from pathlib import Path

from deltaw.errors import AdapterFileError, Fault
from deltaw.store.locate import CONFIG_FILE, RECORD_FILE, TENSORS_FILE

FILES = (CONFIG_FILE, TENSORS_FILE, RECORD_FILE)


def within(root: Path, given: str) -> Path:
    """The folder that a client names, relative to `root` or absolute below it; AdapterFileError for any other.

    What was allowed once has to be asked again before each reading: a folder can become a link. What is refused does
    not tell what there is outside of the root.
    """
    refused = AdapterFileError(Fault("lora_path", "is not a folder of an adapter below the server's --adapter-root",
                                     "a path relative to it, without links"))
    if not given or "\0" in given or len(given) > 4096 or "://" in given or given.startswith("~"):
        raise refused
    root = root.resolve()
    path = Path(given) if Path(given).is_absolute() else root / given
    if ".." in path.parts or not path.is_relative_to(root):
        raise refused
    try:
        steps = [root.joinpath(*path.relative_to(root).parts[:n + 1]) for n in range(len(path.relative_to(root).parts))]
        if any(step.is_symlink() for step in [*steps, *(path / name for name in FILES)]) or not path.is_dir():
            raise refused
        if not (path / CONFIG_FILE).is_file() or not (path / TENSORS_FILE).is_file():
            raise refused
        if not path.resolve().is_relative_to(root):
            raise refused
    except OSError as error:  # too long a name, for one
        raise refused from error
    return path
