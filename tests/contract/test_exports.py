"""The public face: exactly the names of `__all__`, each of which resolves, in whatever order things are imported."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import types
from pathlib import Path

import pytest

import deltaw

PUBLIC = {
    "Adapter", "LoraConfig", "Plan", "PlanConfig", "Switchboard", "TrainConfig", "__version__", "attach", "board",
    "detach", "errors", "load", "merge_files", "plan", "train",
}


def test_the_names_are_the_contract() -> None:
    assert set(deltaw.__all__) == PUBLIC
    assert sorted(deltaw.__all__) == deltaw.__all__
    assert set(deltaw.__all__) <= set(dir(deltaw))


@pytest.mark.parametrize("name", sorted(PUBLIC - {"__version__"}))
def test_each_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(deltaw, name)
    assert (value.__doc__ or "").strip()
    assert name == "errors" or callable(value)


def test_type_checkers_see_the_same_names(repo: Path) -> None:
    tree = ast.parse((repo / "deltaw" / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.asname: node.module for node in imports for alias in node.names}
    assert set(seen) == PUBLIC - {"__version__"}
    for name, module in seen.items():
        if name not in ("errors", "plan", "train"):
            assert getattr(importlib.import_module(module), name) is getattr(deltaw, name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'atach'"):
        _ = deltaw.atach  # type: ignore[attr-defined]


@pytest.mark.parametrize("first", ["", "import deltaw.train", "import deltaw.train.loop", "from deltaw import train"])
def test_train_is_a_call_and_a_package(first: str, repo: Path) -> None:
    """Python binds the package's name on `deltaw` when a submodule is imported: it has to stay callable."""
    check = "import deltaw; assert callable(deltaw.train)"
    code = f"{first}\n{check}\nimport deltaw.train.loop\n{check}"
    run = subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert isinstance(deltaw.train, types.ModuleType)
