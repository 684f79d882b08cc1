"""`deltaw plan` from the command line: its table, its JSON, and how it says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltaw.cli.main import main


def test_the_table_names_every_way_and_says_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "smollm2-135m", "--device", "rtx4090", "--batch-size", "1", "--max-length", "64",
                 "--methods", "full,lora,qlora", "--rows", "100"]) == 0
    out = capsys.readouterr().out
    for word in ("full", "lora", "qlora", "2,442,240", "activations", "largest rank", "fits", "estimate"):
        assert word in out


def test_json_is_one_object_with_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "smollm2-135m", "--device", "h100", "--batch-size", "1", "--max-length", "32",
                 "--methods", "lora", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    lora = found["methods"][0]
    assert lora["parameters"] == sum(lora["sites"].values()) == 2_442_240
    assert set(lora["memory"]) == {"train", "evaluate", "save", "merge", "load"}
    train = lora["memory"]["train"]
    assert train["total"] == pytest.approx(sum(v for k, v in train.items() if k != "total"), abs=len(train))
    assert lora["fits"] is True


def test_an_unknown_device_comes_with_near_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "smollm2-135m", "--device", "rtx409", "--methods", "lora"]) == 1
    assert "rtx4090" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "word"), [
    ([], "--model"), (["--model", "x", "--memory", "lots"], "14GB"), (["--model", "x", "--methods", "lorra"], "lora"),
    (["--model", "x", "--batch-size", "0"], "--batch-size"), (["--model", "x", "--quantize", "nf5"], "nf4"),
])
def test_wrong_options_are_usage_errors(arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    assert word in capsys.readouterr().err


def test_a_folder_without_headers_is_refused_with_a_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert main(["plan", "--model", str(tmp_path)]) == 1
    assert "has no weights" in capsys.readouterr().err
