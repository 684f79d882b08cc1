"""examples/demo.py: what it makes of the ratings, and a short run of all of it on the real model."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from deltaw.cli.main import main


@pytest.fixture(scope="session")
def demo(repo: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", repo / "examples" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def packed(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def package(demo: ModuleType, tmp_path: Path) -> Callable[[dict[str, bytes]], Path]:
    """A function that packs four files of ratings as the source package has them, and returns the cache folder."""
    def make(ratings: dict[str, bytes]) -> Path:
        inner = packed({f"hutto_ICWSM_2014/{name}_GroundTruth.txt": content for name, content in ratings.items()})
        outer = packed({f"vaderSentiment-3.3.2/{demo.ARCHIVE}": inner})
        (tmp_path / "vaderSentiment-3.3.2.tar.gz").write_bytes(outer)
        return tmp_path

    return make


def real(shared_data: Path, demo: ModuleType) -> dict[str, bytes]:
    return {name: (shared_data / "vader_gt" / f"{name}_GroundTruth.txt").read_bytes() for name in demo.FILES}


def rows(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_clear_cases_as_many_of_each_and_none_twice(demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "HELD_OUT", 4)
    good = [(2.5, f"what a lovely day, number {i}") for i in range(10)]
    bad = [(-1.0, f"what a dreadful day, number {i}") for i in range(6)]
    others = [(0.9, "neither here nor there, it is"), (3.0, "too short"), (2.0, "long " * 50),
              (2.0, "rated well and rated badly!"), (-2.0, "Rated well, and rated badly."),
              (2.0, "What a lovely day - number 3")]
    train, valid = demo.split(iter([*good, *bad, *others]))
    texts = [row["prompt"] for row in [*train, *valid]]
    assert len(texts) == len(set(texts)) == 12
    for part, size in ((train, 4), (valid, 2)):
        assert sum(row["completion"] == "positive" for row in part) == size
        assert sum(row["completion"] == "negative" for row in part) == size
    for row in [*train, *valid]:
        assert ("lovely" in row["prompt"]) == (row["completion"] == "positive")
        assert "dreadful" in row["prompt"] or row["completion"] == "positive"


def test_the_real_ratings(demo: ModuleType, package: Callable[..., Path], shared_data: Path) -> None:
    folder = demo.prepare(package(real(shared_data, demo)))
    train, valid = rows(folder / "train.jsonl"), rows(folder / "valid.jsonl")
    assert (len(train), len(valid)) == (8578, 400)
    plain = [re.sub(r"\W+", " ", row["prompt"].casefold()) for row in [*train, *valid]]
    assert len(set(plain)) == len(plain)
    assert not [text for text in plain if "&amp;" in text]
    for part in (train, valid, valid[:100]):
        assert sum(row["completion"] == "positive" for row in part) == len(part) / 2


def test_it_is_made_once(demo: ModuleType, package: Callable[..., Path], shared_data: Path) -> None:
    cache = package(real(shared_data, demo))
    folder = demo.prepare(cache)
    (cache / "vaderSentiment-3.3.2.tar.gz").unlink()
    assert demo.prepare(cache) == folder


def test_a_package_with_too_little_in_it(demo: ModuleType, package: Callable[..., Path]) -> None:
    cache = package(dict.fromkeys(demo.FILES, b"1\t2.5\tvery good\n"))
    with pytest.raises(SystemExit, match="holds 4 ratings, not 23000; delete it and try again"):
        demo.prepare(cache)


def test_without_a_network(demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: Sequence[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(SystemExit, match="is there a network"):
        demo.prepare(tmp_path)


def test_a_fault_is_a_line(demo: ModuleType, package: Callable[..., Path], shared_data: Path, tmp_path: Path,
                           capsys: pytest.CaptureFixture[str]) -> None:
    cache = package(real(shared_data, demo))
    assert demo.main(["--model", str(tmp_path / "absent"), "--cache", str(cache)]) == 1
    assert "demo: base" in capsys.readouterr().err


@pytest.mark.slow
def test_a_short_run_and_the_commands_that_it_names(demo: ModuleType, package: Callable[..., Path], shared_data: Path,
                                                    smollm2: Path, tmp_path: Path,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "an adapter"
    cache = package(real(shared_data, demo))
    words = ["--model", str(smollm2), "--out", str(out), "--cache", str(cache), "--quick", "--threads", "1"]
    assert demo.main(words) == 0
    text = capsys.readouterr().out
    assert "Left to write" in text
    assert (out / "report.html").is_file()
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("  ")]
    assert [command[1] for command in commands] == ["generate", "chat", "merge"]
    assert main([*commands[0][1:], "--max-new-tokens", "4", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)["answers"][0]
    assert set(answer) == {"prompt", "base", "answer"}
    assert main([*commands[2][1:], "--json"]) == 0
    assert (tmp_path / "an adapter-merged" / "config.json").is_file()
