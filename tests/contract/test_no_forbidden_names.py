"""Files with one subject and a name from the field, short enough to read; functions that fit a screen."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

FORBIDDEN = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}
FILE_LINES, FUNCTION_LINES = 350, 60
ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "deltaw").rglob("*.py"))


def where(source: Path) -> str:
    return str(source.relative_to(ROOT))


def words(path: Path) -> set[str]:
    """The words in the names of a file and its folders: {"data", "row", "order"} for data/row_order.py."""
    return {word for part in path.relative_to(ROOT).with_suffix("").parts for word in part.split("_")}


def test_no_file_is_named_after_nothing() -> None:
    ours = [path for folder in ("deltaw", "tests", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")]
    vague = [where(path) for path in ours if words(path) & FORBIDDEN]
    assert vague == []


@pytest.mark.parametrize("source", SOURCES, ids=where)
def test_files_are_short(source: Path) -> None:
    assert len(source.read_text(encoding="utf-8").splitlines()) <= FILE_LINES


@pytest.mark.parametrize("source", SOURCES, ids=where)
def test_functions_fit_a_screen(source: Path) -> None:
    tree = ast.parse(source.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    lengths = {node.name: (node.end_lineno or node.lineno) - node.lineno + 1 for node in functions}
    assert {name: lines for name, lines in lengths.items() if lines > FUNCTION_LINES} == {}
