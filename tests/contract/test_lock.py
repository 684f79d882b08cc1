"""requirements.lock: exact versions of everything that is asked for, and nothing that holds on one machine only."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


@pytest.fixture
def pins(repo: Path) -> dict[str, str]:
    lines = (repo / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pinned = [line.partition("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): number for name, _, number in pinned}


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-cuda.lock"])
def test_every_line_is_a_name_and_an_exact_version(lock: str, repo: Path) -> None:
    lines = (repo / lock).read_text(encoding="utf-8").splitlines()
    odd = [line for line in lines if not re.fullmatch(r"#.*|[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line)]
    assert odd == []


def test_everything_that_is_asked_for_is_pinned(repo: Path, pins: dict[str, str]) -> None:
    toml = tomllib.loads((repo / "pyproject.toml").read_text(encoding="utf-8"))
    extras = [need for needs in toml["project"]["optional-dependencies"].values() for need in needs]
    asked = {canonicalize_name(Requirement(need).name)
             for need in toml["build-system"]["requires"] + toml["project"]["dependencies"] + extras}
    assert asked - {"deltaw"} <= set(pins)


def test_what_runs_here_is_what_is_pinned(pins: dict[str, str]) -> None:
    different = {}
    for name, pinned in pins.items():
        try:
            installed = version(name).split("+")[0]
        except PackageNotFoundError:
            installed = "absent"
        if installed != pinned:
            different[name] = f"{installed}, pinned {pinned}"
    assert different == {}
