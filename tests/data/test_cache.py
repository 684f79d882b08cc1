"""Kept tokens are those that would be made anew, are found again by content alone, and are never believed blindly."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltaw.data import EncodedData, cache, load_data
from deltaw.data.encode import Encoder
from tests.data.tiny import CHATML, LAST_TURN_DIFFERS, chat, tokenizer

Load = Callable[..., EncodedData]


@pytest.fixture(autouse=True)
def small_files_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SMALLEST", 1)


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows were tokenised, call by call."""
    seen: list[int] = []
    real = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, rows: (seen.append(len(rows)), real(self, rows))[1])
    return seen


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return written(tmp_path / "rows.jsonl", [chat("hello", f"yes {i}", "what?", "the cat sat") for i in range(9)])


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def entries(home: Path) -> list[Path]:
    return sorted((home / ".cache" / "deltaw" / "tokens").glob("*"))


def load(path: Path, **options: Any) -> EncodedData:
    return load_data(path, **{"tokenizer": tokenizer(), "max_length": 40, "cache": True} | options)


def same(one: EncodedData, other: EncodedData) -> bool:
    return ([one[i] for i in range(len(one))] == [other[i] for i in range(len(other))] and one.stats == other.stats
            and one.label_names == other.label_names and list(one.lengths) == list(other.lengths))


def test_the_second_load_tokenises_nothing_and_gives_the_same(rows: Path, encodings: list[int]) -> None:
    fresh = load(rows, cache=False)
    first, second = load(rows), load(rows)
    assert encodings == [9, 9]
    assert (fresh.from_cache, first.from_cache, second.from_cache) == (False, False, True)
    assert same(fresh, second)
    assert second.prompt(3) == fresh.prompt(3)
    assert second.question(3) == "what?"
    assert isinstance(second._columns.ids, np.memmap)


def test_labelled_data_and_its_classes(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", [{"text": f"hello {i}", "label": "ba"[i % 2]} for i in range(6)])
    first, second = load(path, task="seq-cls"), load(path, task="seq-cls")
    assert second.from_cache
    assert same(first, second)
    assert second.label_names == ("a", "b")
    assert not load(path, task="seq-cls", labels=["b", "a"]).from_cache


def test_it_is_the_content_that_counts_and_not_the_name(rows: Path, tmp_path: Path) -> None:
    load(rows)
    (tmp_path / "data").mkdir()
    moved = Path(shutil.copy(rows, tmp_path / "data" / "train.jsonl"))
    assert load(moved).from_cache
    found = load(tmp_path / "data")
    assert found.from_cache
    assert found[0].where == f"{moved}:1"
    text = rows.read_text()
    rows.write_text(text.replace("yes 3", "yes 4"))  # of the same size
    os.utime(rows, (moved.stat().st_atime, moved.stat().st_mtime))
    assert not load(rows).from_cache


def other_special_token() -> Any:
    made = tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["hello"]})
    return made


@pytest.mark.parametrize("change", [
    {"max_length": 39}, {"train_on": "all"}, {"tokenizer": tokenizer(LAST_TURN_DIFFERS)},
    {"tokenizer": tokenizer(CHATML.replace("Be kind.", "Be short."))}, {"tokenizer": other_special_token()},
], ids=["length", "train_on", "template", "default system turn", "special token"])
def test_anything_that_changes_the_tokens_is_another_entry(rows: Path, change: dict[str, Any]) -> None:
    first = load(rows)
    second = load(rows, **change)
    assert not second.from_cache
    assert not same(first, second)
    assert same(load(rows, **change), load(rows, **change, cache=False))


def test_a_template_that_writes_the_date(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dated = tokenizer("{{ strftime_now('%Y') }}" + CHATML)
    assert all(text.startswith(str(time.localtime().tm_year)) for text in cache._rendered(dated))
    load(rows, tokenizer=dated)
    assert load(rows, tokenizer=dated).from_cache
    monkeypatch.setattr(cache, "_rendered", lambda tokenizer: ["what it writes next year"])
    assert not load(rows, tokenizer=dated).from_cache


@pytest.mark.parametrize("damage", ["byte", "cut", "missing", "facts", "no facts", "swapped"])
def test_a_damaged_entry_is_made_again(rows: Path, own_home: Path, damage: str, encodings: list[int]) -> None:
    good = load(rows)
    (entry,) = entries(own_home)
    ids, facts = entry / "ids.npy", entry / "facts.json"
    if damage == "byte":
        content = bytearray(ids.read_bytes())
        content[-3] ^= 1
        ids.write_bytes(content)
    elif damage == "cut":
        ids.write_bytes(ids.read_bytes()[:-5])
    elif damage == "missing":
        ids.unlink()
    elif damage == "facts":
        facts.write_text(facts.read_text().replace('"examples": 9', '"examples": 8'))
    elif damage == "no facts":
        facts.write_text("{")
    else:
        shutil.copy(entry / "ends.npy", entry / "rows.npy")
    again = load(rows)
    assert not again.from_cache
    assert encodings == [9, 9]
    assert same(good, again)
    assert load(rows).from_cache


def test_nothing_is_kept_where_that_is_not_asked_or_not_worth_it(rows: Path, own_home: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    load(rows, cache=False)
    load_data([chat("hello", "yes")], tokenizer=tokenizer(), cache=True)
    monkeypatch.setattr(cache, "SMALLEST", 1 << 20)
    load(rows)
    assert entries(own_home) == []


def test_a_file_that_changes_while_it_is_read_is_not_kept(rows: Path, own_home: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    real = Encoder.encode

    def meanwhile(self: Encoder, found: Any) -> Any:
        with rows.open("a") as file:
            file.write(json.dumps(chat("late", "row")) + "\n")
        return real(self, found)

    monkeypatch.setattr(Encoder, "encode", meanwhile)
    load(rows)
    assert entries(own_home) == []


def test_a_folder_that_cannot_be_written_to_is_a_warning(rows: Path, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DELTAW_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="DELTAW_HOME"):
        assert len(load(rows)) == 9


def test_what_nobody_used_for_long_is_deleted(rows: Path, own_home: Path) -> None:
    load(rows)
    (old,) = entries(own_home)
    long_ago = time.time() - 40 * 24 * 3600
    os.utime(old, (long_ago, long_ago))
    assert load(rows).from_cache  # which is a use
    os.utime(old, (long_ago, long_ago))
    load(rows, max_length=30)
    assert old not in entries(own_home)
    assert len(entries(own_home)) == 1
