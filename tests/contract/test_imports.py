"""Who may import whom, what `import deltaw` costs, and that what is imported is also asked for in pyproject.toml."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

SOURCES = sorted((Path(__file__).parents[2] / "deltaw").rglob("*.py"))
HEAVY = {"accelerate", "bitsandbytes", "datasets", "gguf", "matplotlib", "transformers"}


def names(source: Path) -> str:
    return str(source.relative_to(Path(__file__).parents[2]))


def imported(node: ast.AST) -> list[str]:
    """The dotted names of the modules that an import statement names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []


def at_import(node: ast.AST) -> Iterator[str]:
    """The modules that are imported when the file itself is: not in functions, not for type checkers only."""
    for child in ast.iter_child_nodes(node):
        only_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if not only_types and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from imported(child)
            yield from at_import(child)


def test_the_import_contract_holds(repo: Path) -> None:
    run = subprocess.run([Path(sys.executable).parent / "lint-imports", "--no-logo", "--no-cache"], cwd=repo,
                         capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("module", ["deltaw", "deltaw.errors", "deltaw.cli.main"])
def test_importing_costs_neither_torch_nor_transformers(module: str, repo: Path) -> None:
    code = f"import sys, {module}; print(*sorted({{'torch', 'transformers', 'numpy'}} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []


@pytest.mark.parametrize("source", SOURCES, ids=names)
def test_heavy_libraries_are_imported_when_used(source: Path) -> None:
    tree = ast.parse(source.read_text(encoding="utf-8"))
    barred = HEAVY | ({"torch"} if source.parent.name == "cli" else set())
    assert [name for name in at_import(tree) if name.split(".")[0] in barred] == []


@pytest.mark.parametrize("source", SOURCES, ids=names)
def test_no_module_leans_on_the_public_face(source: Path) -> None:
    """`import deltaw` or `from deltaw import attach` inside deltaw would reach upward behind the contract's back."""
    packages = {path.name.removesuffix(".py") for path in (SOURCES[0].parent).iterdir()} | {"__version__"}
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        assert "deltaw" not in imported(node) or isinstance(node, ast.ImportFrom), f"line {node.lineno}"
        if isinstance(node, ast.ImportFrom) and node.module == "deltaw":
            assert {alias.name for alias in node.names} <= packages, f"line {node.lineno}"


def test_every_library_that_is_imported_is_declared(repo: Path) -> None:
    project = tomllib.loads((repo / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needs = project["dependencies"] + [
        need for extra in ("quant", "gguf", "report", "hub-data", "serve")
        for need in project["optional-dependencies"][extra]
    ]
    by_torch = (repo / "requirements-cuda.lock").read_text(encoding="utf-8").splitlines()
    needs += [line for line in by_torch if not line.startswith("#")]
    declared = {canonicalize_name(Requirement(need).name) for need in needs}
    providers = packages_distributions()
    undeclared = set()
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            for top in {name.split(".")[0] for name in imported(node)} - sys.stdlib_module_names - {"deltaw"}:
                if not {canonicalize_name(name) for name in providers.get(top, [top])} & declared:
                    undeclared.add(f"{names(source)}: {top}")
    assert undeclared == set()
