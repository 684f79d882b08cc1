"""The tree that README.md draws is the tree that is there."""

from __future__ import annotations

import re
from pathlib import Path


def drawn(readme: str) -> set[str]:
    """The names at the start of the lines of the fenced block under the heading "The tree"."""
    section = re.search(r"^## The tree\n(.*?)(?=^## |\Z)", readme, re.MULTILINE | re.DOTALL)
    assert section, 'README.md has no heading "## The tree"'
    block = re.search(r"^```[a-z]*\n(.*?)^```", section[1], re.MULTILINE | re.DOTALL)
    assert block, 'the section "The tree" of README.md has no fenced block'
    return set(re.findall(r"(?:^|[\s│├└─])([\w.]+(?:\.py|/))(?=\s|$)", block[1], re.MULTILINE))


def test_the_readme_draws_every_package_of_deltaw_and_no_other(repo: Path) -> None:
    names = drawn((repo / "README.md").read_text(encoding="utf-8"))
    there = {f"{path.name}/" if path.is_dir() else path.name for path in (repo / "deltaw").iterdir()
             if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert there <= names
    folders = [*repo.iterdir(), *(repo / "deltaw").rglob("*"), *(repo / "tests").iterdir()]
    assert {name for name in names if name.endswith("/")} <= {f"{path.name}/" for path in folders if path.is_dir()}
