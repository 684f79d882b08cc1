"""Where deltaw keeps what the next run can use: converted files, tokens, compiled kernels, rates, walked networks."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """The folder for what deltaw keeps between runs: the environment's DELTAW_HOME, or ~/.cache/deltaw."""
    return Path(os.environ.get("DELTAW_HOME") or "~/.cache/deltaw").expanduser()
