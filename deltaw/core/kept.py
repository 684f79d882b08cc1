"""What deltaw keeps between runs so that the next one starts at once: folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

_STALE_S = 6 * 3600


def keep(folder: Path, fill: Callable[[Path], object]) -> None:
    """Make `folder` appear by one rename, with what `fill` writes into the path that it is given.

    What `fill` raises, and an OSError of the folders around it, leaves nothing behind. Where another process was first,
    its folder stays.
    """
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder.parent)
        fill(partial)
        with contextlib.suppress(OSError):  # another process was first; its folder holds the same
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove what killed processes left half-written; a living one is younger than six hours."""
    for left in folder.glob(".*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _STALE_S:
                shutil.rmtree(left, ignore_errors=True)
