"""What people get wrong ends in one clear message, exit 1 or 2, no traceback, and nothing half-written."""

from __future__ import annotations

import errno
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import FAST, write_base, write_rows

Run = Callable[..., tuple[int, str, str]]
GOOD = {"prompt": "is the sky blue ?", "completion": "yes"}


@pytest.fixture
def train(deltaw: Run, base: Path, rows: Path, tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """A function that trains on the tiny base; options given to it count more than its own."""
    def run(*more: object, data: object = rows, model: object = base) -> tuple[int, str, str]:
        common = ["--model", model, "--data", data, "--out", tmp_path / "out", *FAST, "--max-steps", 2]
        return deltaw("train", *common, *more)

    return run


def check(result: tuple[int, str, str], out: Path, *said: str, code: int = 1) -> None:
    got, stdout, stderr = result
    assert (got, stdout) == (code, ""), stderr
    for text in said:
        assert text in stderr
    assert "Traceback" not in stderr
    assert not (out / "adapter_model.safetensors").exists()


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize(("options", "said"), [
    (["--target-modules", "q_porj"], ["q_porj", "Did you mean", "q_proj"]),
    (["--target-modules", "q_proj,v_porj,k_porj"], ["v_porj", "k_porj"]),
    (["--columns", "prompt=question"], ["question"]),
    (["--columns", "promt=prompt"], ["promt", "Did you mean prompt"]),
    (["--max-length", "1000"], ["max_length", "at most 64"]),
    (["--model", "package:not_there"], ["no package 'not_there' is installed"]),
    (["--data", "absent.jsonl"], ["absent.jsonl", "no such file"]),
    (["--valid", "absent.jsonl"], ["absent.jsonl"]),
    (["--task", "seq-cls"], ["seq-cls"]),
])
def test_options_that_do_not_fit_the_base_or_the_data(options: list[str], said: list[str], train: Run,
                                                      tmp_path: Path) -> None:
    check(train(*options), tmp_path / "out", *said)


def test_a_rank_above_the_weights_own_is_a_warning(train: Run, tmp_path: Path) -> None:
    code, _, err = train("--r", 40)
    assert code == 0
    assert "warning:" in err
    assert "40" in next(line for line in err.splitlines() if line.startswith("warning:"))


@pytest.mark.parametrize(("row", "said"), [
    ("", []), ("{not json", ["rows.jsonl:2"]), ('["a"]', ["rows.jsonl:2"]),
    (json.dumps({"prompt": "is the sky blue ?"}), ["rows.jsonl:2", "completion"]),
    (json.dumps({"prompt": "is the sky blue ?", "completion": ""}), ["rows.jsonl:2", "empty"]),
    (json.dumps({"prompt": "is the sky blue ?", "completion": 3}), ["rows.jsonl:2", "int"]),
])
def test_a_bad_row_is_named_by_file_and_line(row: str, said: list[str], train: Run, tmp_path: Path) -> None:
    good = json.dumps(GOOD)
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join([good, row, *[good] * 9]) + "\n", encoding="utf-8")
    result = train(data=file)
    if said:
        check(result, tmp_path / "out", *said)
    else:
        assert result[0] == 0  # an empty line between rows holds nothing that could be lost


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file(content: str, train: Run, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(content, encoding="utf-8")
    check(train(data=file), tmp_path / "out", "rows.jsonl", "empty")


def test_nothing_left_to_learn_from(train: Run, tmp_path: Path) -> None:
    check(train("--max-length", 4), tmp_path / "out", "truncation", "Raise max_length")


def test_a_loss_that_is_not_a_number(train: Run, tmp_path: Path, base: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["lm_head.weight"].fill_(float("nan"))
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    check(train(model=broken), tmp_path / "out", "nan")


def test_no_tokenizer(train: Run, tmp_path: Path, base: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    for file in broken.glob("token*"):
        file.unlink()
    check(train(model=broken), tmp_path / "out", "has no tokenizer")


def test_chats_without_a_chat_template(train: Run, tmp_path: Path) -> None:
    plain = write_base(tmp_path / "plain", template=None)
    chat = [{"role": "user", "content": "is the sky blue ?"}, {"role": "assistant", "content": "yes"}]
    rows = [{"messages": chat}] * 12
    check(train(model=plain, data=write_rows(tmp_path / "chats.jsonl", rows)), tmp_path / "out", "has no chat template")


def test_a_disk_that_is_full(train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    check(train(), tmp_path / "out", "disk is full", "nothing was changed")


def test_a_file_where_the_folder_should_be(train: Run, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine", encoding="utf-8")
    code, out, err = train()
    assert (code, out) == (1, "")
    assert "is a file" in err
    assert (tmp_path / "out").read_text(encoding="utf-8") == "mine"


def test_a_base_that_is_a_pickle(train: Run, tmp_path: Path, base: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    check(train(model=broken), tmp_path / "out", "pickle", "never loaded")


# ------------------------------------------------------------------------------------------------------------ adapters


def header(tensors: dict[str, Any]) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


def replaced(content: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "adapter_model.safetensors").write_bytes(content)

    return damage


def truncated(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def not_a_number(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[next(iter(tensors))].fill_(float("nan"))
    save_file(tensors, folder / "adapter_model.safetensors")


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


@pytest.mark.parametrize(("damage", "said"), [
    (truncated, "adapter_model.safetensors"), (replaced(b""), "adapter_model.safetensors"),
    (replaced(struct.pack("<Q", 1 << 60) + b"{}"), "adapter_model.safetensors"),
    (replaced(header({"../../x.lora_A.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}) + bytes(4)),
     "x.lora_A"),
    (not_a_number, "NaN"), (pickled, "is a pickle"),
], ids=["truncated", "empty", "huge header", "traversal", "NaN", "pickle"])
@pytest.mark.parametrize("verb", ["generate", "merge"])
def test_a_damaged_or_hostile_adapter(damage: Callable[[Path], None], said: str, verb: str, deltaw: Run,
                                      tmp_path: Path, base: Path, adapters: dict[str, Path]) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapters["yes"], folder)
    damage(folder)
    more = ["hello"] if verb == "generate" else ["--out", tmp_path / "merged"]
    code, out, err = deltaw(verb, "--model", base, "--adapter", folder, *more)
    assert (code, out) == (1, "")
    assert said in err
    assert "Traceback" not in err
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("verb", ["generate", "eval", "merge"])
def test_an_adapter_for_another_base(verb: str, deltaw: Run, tmp_path: Path, rows: Path,
                                     adapters: dict[str, Path]) -> None:
    other = write_base(tmp_path / "other", seed=1)
    more = {"generate": ["hello"], "eval": ["--data", rows], "merge": ["--out", tmp_path / "merged"]}[verb]
    code, out, err = deltaw(verb, "--model", other, "--adapter", adapters["yes"], *more)
    assert (code, out) == (1, "")
    assert "base" in err
    assert not (tmp_path / "merged").exists()
    assert deltaw(verb, "--model", other, "--adapter", adapters["yes"], "--any-base", *more)[0] == 0


def test_an_adapter_that_is_not_there(deltaw: Run, adapters: dict[str, Path]) -> None:
    code, _, err = deltaw("generate", "--adapter", str(adapters["yes"]) + "s", "hello")
    assert code == 1
    assert "does not exist" in err
    assert "Did you mean yes" in err


def test_an_adapter_without_a_recorded_base(deltaw: Run, tmp_path: Path, adapters: dict[str, Path]) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapters["yes"], folder)
    (folder / "deltaw.json").unlink()
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = None
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    code, _, err = deltaw("generate", "--adapter", folder, "hello")
    assert code == 1
    assert "--model: is not given, and the adapter does not record its base" in err


@pytest.mark.parametrize("name", ["lora", "a.b", "a/b", "ÄÖ 語", "lora_A"])
def test_odd_adapter_names_work(name: str, train: Run, deltaw: Run, tmp_path: Path) -> None:
    assert train("--name", name)[0] == 0
    assert deltaw("generate", "--adapter", tmp_path / "out", "--max-new-tokens", 2, "hello")[0] == 0


def test_a_template_that_is_not_the_trained_one_is_reported(deltaw: Run, tmp_path: Path, adapters: dict[str, Path],
                                                            base: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(base, other)
    template = other / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8") + " ", encoding="utf-8")
    code, _, err = deltaw("generate", "--model", other, "--adapter", adapters["yes"], "--max-new-tokens", 2, "hello")
    assert code == 0
    assert "warning: adapter 'adapter': The adapter was trained with another chat template" in err


def test_a_prompt_longer_than_the_model_takes(deltaw: Run, base: Path) -> None:
    code, out, err = deltaw("generate", "--model", base, "hello " * 80)
    assert (code, out) == (1, "")
    assert "fewer than 64" in err


def test_rows_that_a_classifier_cannot_have(deltaw: Run, base: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"text": "hello", "label": "yes"}] * 12)
    result = deltaw("train", "--model", base, "--data", data, "--out", tmp_path / "out", "--task", "seq-cls", *FAST)
    check(result, tmp_path / "out", "the one label 'yes' in every row")
