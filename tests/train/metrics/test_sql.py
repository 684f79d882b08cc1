"""Queries that say the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltaw.train.metrics import text_figure
from deltaw.train.metrics.sql import logical_form, same_form


@pytest.mark.parametrize(("one", "other"), [
    ('SELECT A FROM TABLE WHERE B = "x y"', "select a from table where b = 'X  Y' ;"),
    ('SELECT A FROM TABLE WHERE B = "1" AND C > 2', 'SELECT A FROM TABLE WHERE C > 2.0 AND B = 1'),
    ("SELECT COUNT(A) FROM TABLE", "select count( a ) from table"),
    ('SELECT A FROM T WHERE B <> "1,000"', "SELECT A FROM T WHERE B != 1000"),
])
def test_the_same_query_written_otherwise(one: str, other: str) -> None:
    assert same_form(one, other)


@pytest.mark.parametrize(("one", "other"), [
    ('SELECT A FROM TABLE WHERE B = "x"', 'SELECT A FROM TABLE WHERE B = "y"'),
    ('SELECT A FROM TABLE WHERE B > 1', "SELECT A FROM TABLE WHERE B < 1"),
    ("SELECT MAX(A) FROM TABLE", "SELECT MIN(A) FROM TABLE"),
    ("SELECT A FROM TABLE", 'SELECT A FROM TABLE WHERE B = "x"'),
    ("SELECT A FROM TABLE", "no query"),
])
def test_another_query(one: str, other: str) -> None:
    assert not same_form(one, other)


def test_values_with_the_words_of_the_language() -> None:
    query = 'SELECT A FROM TABLE WHERE B = "black and white" AND C = "where"'
    assert logical_form(query) == ("", "a", "table", frozenset({("b", "=", "black and white"), ("c", "=", "where")}))


def test_nearly_every_query_of_the_real_data_is_of_the_form(shared_data: Path) -> None:
    lines = (shared_data / "wikisql" / "wikisql_test.jsonl").read_text(encoding="utf-8").splitlines()
    queries = [json.loads(line)["sql"] for line in lines]
    assert sum(logical_form(query) is not None for query in queries) > 0.97 * len(queries)
    assert text_figure("logical_form", queries, [[query] for query in queries]) == ("logical_form", 1.0)
