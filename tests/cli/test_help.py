"""Help: complete, at once, without torch, and the same in the documentation."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest

from deltaw.baselines.config import BaselineConfig
from deltaw.cli.main import VERBS, overview
from deltaw.cli.options import option_name
from deltaw.core.config import LoraConfig
from deltaw.train.config import TrainConfig

LIMIT_S = 1.5
"""The promise is 0.3 s; a machine that runs other tests at the same time is given more."""


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_answers_at_once_and_loads_no_torch(verb: str, repo: Path) -> None:
    arguments = [verb, "--help"] if verb else ["--help"]
    code = (f"import sys; from deltaw.cli.main import main; code = main({arguments}); "
            "heavy = {'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules); assert not heavy, heavy; "
            "sys.exit(code)")
    times = []
    for _ in range(3):
        began = time.perf_counter()
        run = subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True, check=False)
        times.append(time.perf_counter() - began)
        assert run.returncode == 0, run.stderr
        assert run.stderr == ""
        assert "deltaw" in run.stdout
    print(f"deltaw {verb} --help: {min(times):.3f} s")
    assert min(times) < LIMIT_S


def test_the_overview_names_every_verb() -> None:
    for verb, text in VERBS.items():
        assert f"  {verb:<10}{text}" in overview()


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_has_help(verb: str) -> None:
    for action in import_module(f"deltaw.cli.{verb}").parser()._actions:
        assert action.help, action.dest


def test_help_of_train_has_every_field() -> None:
    text = import_module("deltaw.cli.train").parser().format_help()
    for field in (*fields(TrainConfig), *fields(LoraConfig), *fields(BaselineConfig)):
        if field.name not in ("lora", "baseline"):
            name = option_name(field.name).removeprefix("--")
            assert re.search(rf"^  --(\[no-\])?{name}\b", text, re.MULTILINE), field.name
    assert "[default: 8]" in text
    assert max(map(len, text.split("\n\nLists are")[0].splitlines())) <= 100


@pytest.mark.parametrize("verb", VERBS)
def test_the_documentation_shows_the_same_help(verb: str, repo: Path) -> None:
    page = (repo / "docs" / f"{verb}.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- help -->\n```text\n(.*?)```\n<!-- /help -->", page, re.DOTALL)
    assert shown, "no help between its markers"
    assert shown[1] == import_module(f"deltaw.cli.{verb}").parser().format_help(), "run: python docs/write_help.py"


def test_no_verb_shows_the_overview_and_is_an_error(deltaw: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = deltaw()
    assert (code, out) == (2, "")
    assert err == overview()


def test_version(deltaw: Callable[..., tuple[int, str, str]]) -> None:
    assert deltaw("--version")[:2] == (0, "deltaw 0.1.0\n")
