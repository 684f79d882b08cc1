"""`deltaw convert` at the command line: what it writes, what it says, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import deltaw
from deltaw.cli.main import main
from tests.convert.test_gguf import build, make_adapter, read

pytest.importorskip("gguf", reason="gguf is not installed")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    build("llama", tmp_path / "base")
    return tmp_path / "base"


def test_a_model_with_its_modelfile(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "files" / "m.gguf"
    words = ["convert", "--to", "gguf", "--model", str(base), "--out", str(out), "--dtype", "q8_0", "--modelfile"]
    assert main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["kind"], report["architecture"], report["dtype"]) == ("model", "llama", "q8_0")
    assert report["bytes"] == out.stat().st_size
    assert Path(report["modelfile"]).read_text().startswith("FROM ./m.gguf\n")
    assert main(words) == 1
    assert "exists" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    assert "tokenizer: tokenizer.json" in capsys.readouterr().out


def test_an_adapter_for_llama_cpp_and_for_peft(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_adapter(build("llama", tmp_path / "same"), use_rslora=True).save(tmp_path / "adapter")
    words = ["convert", "--adapter", str(tmp_path / "adapter"), "--model", str(base)]
    assert main([*words, "--to", "gguf", "--out", str(tmp_path / "a.gguf")]) == 0
    assert read(tmp_path / "a.gguf")[0]["adapter.lora.alpha"] == pytest.approx(6 * 4**0.5)
    assert main([*words, "--to", "peft", "--out", str(tmp_path / "again"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["sites"] == 14
    first, second = deltaw.load(tmp_path / "adapter"), deltaw.load(tmp_path / "again")
    assert all(first.delta(site).equal(second.delta(site)) for site in first.sites)


@pytest.mark.parametrize(("words", "fault"), [
    ([], "--to: is missing"), (["--to", "gguf", "--out", "m"], "--model: is missing"),
    (["--to", "peft", "--out", "m", "--model", "b"], "--adapter: is missing"),
    (["--to", "ggfu", "--out", "m", "--model", "b"], "gguf"), (["--too", "gguf"], "Did you mean --to")])
def test_a_wrong_command_line(words: list[str], fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", *words]) == 2
    assert fault in capsys.readouterr().err
