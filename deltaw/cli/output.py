"""What a verb prints: one JSON object with `--json`, else tables and lines for a person."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

WIDTH = 160
"""Columns of a table that no terminal shows."""


def print_json(values: Mapping[str, Any]) -> None:
    """One JSON object on stdout. A figure that is not finite is null: JSON has no name for it."""
    print(json.dumps(_finite(values), ensure_ascii=False), flush=True)


def say(text: str) -> None:
    """A line for the person at the terminal, on stderr."""
    print(text, file=sys.stderr, flush=True)


def print_next(commands: Sequence[str], page: Path | None = None) -> None:
    """The commands to try next, each on one line that can be copied."""
    if page is not None:
        print(f"\nreport  {page}")
    if commands:
        print("\nTry next:" if len(commands) > 1 else "\nNext:")
    for command in commands:
        print(f"  {command}")
    sys.stdout.flush()


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout, its first column on the left and figures on the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width to keep to
        console = Console(width=WIDTH)
    console.print(table)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and value - value != 0.0:
        return None
    return value
