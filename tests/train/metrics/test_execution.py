"""What queries return beside what they should; that they only read; and rows that name nothing to ask."""

from __future__ import annotations

import json
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

import deltaw
from deltaw.cli.main import main
from deltaw.data import load_data
from deltaw.errors import ConfigError, DataError
from deltaw.train.metrics import execution
from deltaw.train.metrics.execution import Table, databases_of, execution_accuracy

PEOPLE = Table(header=("name", "Home Team", "age"), name="people",
               rows=(("Ann", "York", 1), ("Bob", "Leeds", 2), ("Cid", "york", 2), ("Dee", None, 30)))
WANTED = "SELECT name FROM people WHERE age = 2"


@pytest.fixture
def database(tmp_path: Path) -> Path:
    with sqlite3.connect(tmp_path / "t.db") as connection:
        connection.execute("CREATE TABLE people (name TEXT, age INT)")
        connection.executemany("INSERT INTO people VALUES (?, ?)", [("a", 1), ("b", 2), ("c", 2)])
    connection.close()
    return tmp_path / "t.db"


def right(answer: str, expected: str = WANTED, on: Path | Table = PEOPLE) -> bool:
    return execution_accuracy([answer], [expected], [on]) == 1


def test_it_is_the_share_of_answers_that_return_the_same(database: Path) -> None:
    given = ["SELECT name FROM people WHERE age > 1 ORDER BY name DESC", "SELECT name FROM people WHERE age = 1",
             "SELECT nothing FROM people", WANTED]
    assert execution_accuracy(given, [WANTED] * 4, [database] * 4) == 0.5
    assert execution_accuracy([WANTED, "SELECT 1"], [WANTED, "SELECT 2"], [database, PEOPLE]) == 0.5


def test_rows_count_as_often_as_they_come_and_in_order_where_it_was_asked_for() -> None:
    assert not right("SELECT DISTINCT age FROM people WHERE age = 2", "SELECT age FROM people WHERE age = 2")
    assert not right("SELECT name FROM people", WANTED)  # the right rows, and more
    ordered = "SELECT name FROM people ORDER BY name"
    assert right("SELECT name FROM people ORDER BY name ASC", ordered)
    assert not right("SELECT name FROM people ORDER BY name DESC", ordered)
    assert right("SELECT name FROM people ORDER BY name DESC", "SELECT name FROM people")


def test_a_table_of_the_data_compares_text_without_case_and_numbers_as_numbers() -> None:
    assert right('SELECT name FROM people WHERE "home team" = "YORK"', 'SELECT name FROM people WHERE name <= "Ann" '
                 'OR name = "cid"')
    assert right("SELECT MAX(age) FROM people", "SELECT 30")
    unnamed = Table(header=("a",), rows=((1,), (2,)))
    assert right("SELECT a FROM TABLE WHERE a > 1", 'SELECT a FROM "table" WHERE a = 2', unnamed)


@pytest.mark.parametrize("answer", ["", "no query", "SELECT", "SELECT 'a\0b", "SELECT name FROM people; SELECT 1",
                                    "-- nothing", "SELECT randomblob(100000000)"])
def test_what_is_no_query_is_wrong(answer: str) -> None:
    assert not right(answer, "SELECT name FROM people WHERE age = 99")  # which returns nothing either


@pytest.mark.parametrize("answer", [
    "DROP TABLE people", "DELETE FROM people", "INSERT INTO people VALUES ('x', 9)", "CREATE TABLE u (a)",
    "ATTACH DATABASE 'new.db' AS other", "VACUUM INTO 'new.db'", "PRAGMA user_version = 7"])
def test_answers_can_only_read(answer: str, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(database.parent)
    before = database.read_bytes()
    assert execution_accuracy([answer, WANTED], [WANTED] * 2, [database] * 2) == 0.5
    assert database.read_bytes() == before
    assert [file.name for file in database.parent.iterdir()] == ["t.db"]


def test_an_answer_that_takes_too_long_is_stopped_and_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "QUERY_SECONDS", 0.1)
    began = time.monotonic()
    assert not right("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT MAX(i) FROM n")
    assert not right("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n")  # rows for ever
    assert time.monotonic() - began < 5


# --------------------------------------------------------------------------------------------------- rows of a data set

EXPECTED = "SELECT b FROM t"
THING = {"header": ["b"], "rows": [["x"]], "name": "t"}


def write(path: Path, **more: Any) -> Path:
    rows = [{"prompt": f"{i}:", "completion": EXPECTED, **more} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_row_names_a_file_beside_the_data_or_holds_a_table(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    with sqlite3.connect(tmp_path / "sub" / "own.db") as connection:
        connection.execute("CREATE TABLE t (b)")
    connection.close()
    for more, columns in (({"database": "sub/own.db"}, {}), ({"table": THING}, {}), ({"table": json.dumps(THING)}, {}),
                          ({"db": str(tmp_path / "sub" / "own.db")}, {"database": "db"})):
        data = load_data(write(tmp_path / "rows.jsonl", **more), tokenizer=tokenizer, columns=columns)
        found = databases_of(data, [0, 5])
        assert len(found) == 2
        assert found[0] == (tmp_path / "sub/own.db" if "table" not in more else
                            Table(header=("b",), rows=(("x",),), name="t"))


@pytest.mark.parametrize(("more", "message"), [
    ({}, "names no database and has no table"), ({"database": "none.db"}, "no file .*none.db"),
    ({"table": "{"}, "not JSON"), ({"table": [1]}, "is list"), ({"table": {"header": "b", "rows": []}}, "header"),
    ({"table": {"header": ["b", "B"], "rows": []}}, "two columns 'b'"),
    ({"table": {"header": ["b"], "rows": [["x", 1]]}}, "rows are not lists of 1"),
    ({"table": {"header": ["c"], "rows": [], "name": "t"}}, "'SELECT b FROM t' fails: no such column: b"),
    ({"table": {"header": ["b"], "rows": [[2**70]], "name": "t"}}, "fails: .*too large"),
])
def test_every_row_that_cannot_be_asked_is_told_with_its_line(more: dict[str, Any], message: str, tokenizer: Any,
                                                              tmp_path: Path) -> None:
    data = load_data(write(tmp_path / "rows.jsonl", **more), tokenizer=tokenizer)
    with pytest.raises(DataError, match=message) as caught:
        databases_of(data, range(3))
    assert len(caught.value.faults) == 3
    assert "rows.jsonl:2" in str(caught.value)


def train(base_folder: Path, data: Path, out: Path) -> Any:
    return deltaw.train(deltaw.TrainConfig(
        model=str(base_folder), data=str(data), out=str(out), method="full", max_steps=60, eval_every=0, eval_rows=4,
        batch_size=8, learning_rate=5e-3, metrics=("execution",), max_new_tokens=20, device="cpu", plan="off",
        samples=0))


def test_a_run_is_judged_by_it_and_eval_too(base_folder: Path, tmp_path: Path, capsys: Any) -> None:
    data = write(tmp_path / "rows.jsonl", table=THING)
    result = train(base_folder, data, tmp_path / "run")
    assert result.before["execution"] == 0
    assert result.after["execution"] == 1
    capsys.readouterr()
    assert main(["eval", "--adapter", str(tmp_path / "run"), "--data", str(data), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["adapter_figures"]["execution"] == 1
    assert figures["base_figures"]["execution"] == 0


def test_a_run_whose_rows_name_nothing_does_not_start(base_folder: Path, color_rows: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="names no database and has no table"):
        train(base_folder, color_rows, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_text_without_answers_has_no_execution(base_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "abc"}\n' * 9)
    with pytest.raises(ConfigError, match="no prompt and answer"):
        train(base_folder, tmp_path / "rows.jsonl", tmp_path / "run")


@pytest.mark.slow
def test_methods_are_compared_by_it(base_folder: Path, tmp_path: Path, capsys: Any) -> None:
    data = write(tmp_path / "rows.jsonl", table=THING)
    assert main(["compare", "--model", str(base_folder), "--data", str(data), "--test", str(data), "--out",
                 str(tmp_path / "study"), "--methods", "full", "--seeds", "0", "--no-latency", "--metrics", "execution",
                 "--rate-factor", "100", "--max-steps", "60", "--batch-size", "8", "--eval-every", "0",
                 "--max-new-tokens", "20", "--device", "cpu", "--plan", "off", "--json"]) == 0
    row, = json.loads(capsys.readouterr().out)["rows"]
    assert row["figures"]["execution"]["mean"] == 1
