"""What a run says while it works: lines on stderr, for the person at the terminal."""

from __future__ import annotations

import sys

from deltaw import bases
from deltaw.core.packed import numbers_in
from deltaw.train.examples import Examples


def announce(base: bases.Base, examples: Examples) -> None:
    """Say what was loaded and what was left out."""
    count = sum(numbers_in(p) for p in base.model.parameters())
    say(f"base {base.source}: {count / 1e6:,.1f} M parameters in {base.precision}")
    say(examples.describe())


def say(text: str, quiet: bool = False) -> None:
    """One line for the person at the terminal."""
    if not quiet:
        print(text, file=sys.stderr, flush=True)
