"""What a study needs is looked at before its first run."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltaw.compare import compare
from deltaw.compare.config import CompareConfig
from deltaw.compare.inputs import check_inputs
from deltaw.errors import BaseModelError, DataError
from deltaw.train.config import TrainConfig
from tests.cli.conftest import questions, write_base, write_rows


@pytest.fixture
def base(tmp_path: Path) -> str:
    return str(write_base(tmp_path / "base"))


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return str(write_rows(tmp_path / "rows.jsonl", questions("yes")[:2]))


def config(folder: Path, model: str, data: str, test: str | None = None, **changes: object) -> CompareConfig:
    return CompareConfig(train=TrainConfig(model=model, data=data, out=str(folder / "study"), **changes), test=test)


def test_what_is_there_passes(tmp_path: Path, base: str, rows: str) -> None:
    check_inputs(config(tmp_path, base, rows, rows))


def test_every_missing_thing_is_told_at_once_and_nothing_is_begun(tmp_path: Path, base: str, rows: str) -> None:
    with pytest.raises(BaseModelError) as caught:
        compare(config(tmp_path, base + "-s", rows + "x", rows + "y"))
    assert len(caught.value.faults) == 3
    assert "Did you mean base" in str(caught.value)
    assert not (tmp_path / "study").exists()


def test_data_of_another_form_is_refused(tmp_path: Path, base: str, rows: str) -> None:
    with pytest.raises(DataError, match="label"):
        check_inputs(config(tmp_path, base, rows, task="seq-cls"))


def test_queries_that_can_be_asked_of_nothing_are_refused_where_they_are_judged(tmp_path: Path, base: str,
                                                                                 rows: str) -> None:
    table = {"header": ["a"], "rows": [[1]]}
    asked = str(write_rows(tmp_path / "asked.jsonl", [
        {"prompt": "all ?", "completion": "select a from table", "table": table}] * 2))
    check_inputs(config(tmp_path, base, rows, asked, metrics=("execution",)))
    with pytest.raises(DataError, match="a column 'database'"):
        check_inputs(config(tmp_path, base, asked, rows, metrics=("execution",)))
