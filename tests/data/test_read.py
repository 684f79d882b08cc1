"""Every file format gives the same rows; bad files are refused with file and line; rows are not held in memory."""

from __future__ import annotations

import csv
import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaw.data import available_splits, open_source
from deltaw.data.text_files import Delimited
from deltaw.errors import ConfigError, DataError

ROWS = [{"prompt": f"question {i}", "completion": text} for i, text in enumerate(
    ["plain", 'with "quotes"', "with\nline\r\nbreaks", "comma, tab\t;", "ünïcode 猫 \u2028 \x0b", " spaces ",
     "x" * 200_000])]


def write(folder: Path, kind: str, rows=ROWS, name="train") -> Path:
    path = folder / f"{name}.{kind}"
    if kind in ("jsonl", "ndjson"):
        path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    elif kind == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif kind in ("csv", "tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json", "csv", "tsv", "parquet"])
def test_every_format_gives_the_rows_in_any_order(tmp_path, kind):
    source = open_source(write(tmp_path, kind))
    assert len(source) == len(ROWS)
    assert source.columns == ("prompt", "completion")
    assert [row.values for row in source.read(0, 99)] == ROWS
    for i in (6, 2, 4, 0, -1):
        assert source[i].values == ROWS[i]
        assert source[i].where == source.where(i)
    with pytest.raises(IndexError):
        source[len(ROWS)]


def test_lines_are_counted_as_an_editor_does(tmp_path):
    lines = open_source(write(tmp_path, "jsonl"))
    assert lines.where(3) == f"{tmp_path / 'train.jsonl'}:4"
    table = open_source(write(tmp_path, "csv"))
    assert [table.where(i).rpartition(":")[2] for i in range(5)] == ["2", "3", "4", "7", "8"]


def test_a_plain_text_is_its_paragraphs(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes("\ufeffone\r\n  two 猫\r\n\r\n \t\r\nthree\n\n\n\nfour".encode())
    source = open_source(path)
    assert source.columns == ("text",)
    assert [row.values for row in source.read(0, 9)] == [{"text": "one\n  two 猫"}, {"text": "three"}, {"text": "four"}]
    assert [source.where(i) for i in range(3)] == [f"{path}:{line}" for line in (1, 5, 9)]


def test_a_text_beside_the_data_of_a_split_is_not_another_file_of_it(tmp_path):
    write(tmp_path, "jsonl")
    for name in ("train.txt", "test.txt"):
        (tmp_path / name).write_text("What this is.\n")
    assert open_source(tmp_path).name.endswith("train.jsonl")
    assert open_source(tmp_path, "test")[0].values == {"text": "What this is."}


@given(st.lists(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=12),
                         min_size=2, max_size=2), min_size=1, max_size=8), st.sampled_from([",", "\t"]))
def test_any_table_that_csv_writes_is_read_back(tmp_path_factory, cells, delimiter):
    path = tmp_path_factory.mktemp("table") / "x.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows([["a", "b"], *cells])
    assert [list(row.values.values()) for row in Delimited(path, delimiter).read(0, 99)] == cells


def test_a_byte_order_mark_and_blank_lines_are_no_rows(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}')
    source = open_source(path)
    assert [row.values["text"] for row in source.read(0, 9)] == ["a", "b"]
    assert source.where(1).endswith(":4")
    table = tmp_path / "x.csv"
    table.write_bytes(b"\xef\xbb\xbftext\na\n\nb\n")
    assert [row.values for row in open_source(table).read(0, 9)] == [{"text": "a"}, {"text": "b"}]


def test_a_tsv_with_plain_quotes_is_read_without_quoting(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_text('text\tlabel\n"good" film\t1\nso "bad\t0\n"unclosed\t1\n')
    assert [row.values["text"] for row in open_source(path).read(0, 9)] == ['"good" film', 'so "bad', '"unclosed']


def test_json_lines_under_the_name_json(tmp_path):
    path = write(tmp_path, "jsonl")
    assert [r.values for r in open_source(path.rename(tmp_path / "train.json")).read(0, 99)] == ROWS


# --------------------------------------------------------------------------------------------------- bad files

@pytest.mark.parametrize(("name", "content", "where", "says"), [
    ("x.jsonl", b'{"a": 1}\n{"a": \n{"a": 3}\n[1]\n', ":2", "is not JSON"),
    ("x.jsonl", b'{"a": 1}\n{"a": \n{"a": 3}\n[1]\n', ":4", "is a JSON list"),
    ("x.jsonl", b'{"a": "\xff"}\n{"a": 2}\n', ":1", "0xff"),
    ("x.jsonl", b"\n \n", "x.jsonl", "only blank lines"),
    ("x.csv", b"a,b\n1,2\n3\n4,5\n", ":3", "has 1 cells; expected 2"),
    ("x.csv", b'a,b\n1,2\n3,"open\n4,5\n', ":3", "not a record"),
    ("x.csv", b"a,a\n1,2\n", ":1", "names a column twice"),
    ("x.csv", b"a,b\n", "x.csv", "has no rows"),
    ("x.csv", b"a,b\n1,2\n\xe9,3\n", ":3", "0xe9"),
    ("x.tsv", b"a\tb\n1\t2\t3\n", ":2", "has 3 cells"),
    ("x.json", b'[{"a": 1},\n {"a" 2}]', ":2", "is not JSON"),
    ("x.json", b'[{"a": 1}, 3]', "row 2", "is int"),
    ("x.json", b"[]", "x.json", "is empty"),
    ("x.json", b'{"data":\n [{"a": 1}]}', "x.json", "holds one JSON object"),
    ("x.json", b"[\xff]", "x.json", "0xff"),
    ("x.parquet", b"PAR1 and nothing", "x.parquet", "not a Parquet file"),
    ("x.md", b"hello", "x.md", "unknown format"),
    ("x.txt", b" \n\n", "x.txt", "only blank lines"),
    ("x.txt", b"a\n\nb\xff\n", ":3", "0xff"),
])
def test_a_bad_file_is_refused_with_its_place(tmp_path, name, content, where, says):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        open_source(path)
    assert any(where in str(fault) and says in str(fault) for fault in caught.value.faults), str(caught.value)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv"])
def test_an_empty_file(tmp_path, kind):
    (tmp_path / f"x.{kind}").touch()
    with pytest.raises(DataError, match=r"is empty|not JSON|no rows"):
        open_source(tmp_path / f"x.{kind}")


def test_an_empty_parquet_file(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"a": pyarrow.array([], pyarrow.string())}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="is empty"):
        open_source(tmp_path / "x.parquet")


def test_twenty_faults_are_listed_and_the_others_counted(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("bad\n" * 50)
    with pytest.raises(DataError, match="and 30 more") as caught:
        open_source(path)
    assert len(caught.value.faults) == 21


def test_deep_nesting_is_a_fault_and_no_crash(tmp_path):
    for name in ("x.jsonl", "x.json"):
        (tmp_path / name).write_text("[" * 200_000)
        with pytest.raises(DataError, match=r"JSON|nested"):
            open_source(tmp_path / name)


# ------------------------------------------------------------------------------------------- folders, Hub, memory

@pytest.mark.parametrize("alias", ["valid", "validation", "dev", "val"])
def test_a_folder_has_a_file_for_each_split(tmp_path, alias):
    write(tmp_path, "jsonl", ROWS[:3])
    write(tmp_path, "csv", ROWS[3:5], name=alias)
    (tmp_path / "notes.jsonl").write_text("not data")
    assert available_splits(tmp_path) == ("train", "valid")
    assert len(open_source(tmp_path)) == 3
    assert open_source(tmp_path, "valid")[0].values == ROWS[3]
    assert open_source(tmp_path, "dev")[0].values == ROWS[3]
    with pytest.raises(DataError, match=r"no file for the split 'test'.*it has train, valid"):
        open_source(tmp_path, "test")
    with pytest.raises(DataError, match="Did you mean train"):
        open_source(tmp_path, "trian")


def test_shards_are_joined_in_order(tmp_path):
    write(tmp_path, "parquet", ROWS[:4], name="train-00000-of-00002")
    write(tmp_path, "parquet", ROWS[4:], name="train-00001-of-00002")
    source = open_source(tmp_path)
    assert [row.values for row in source.read(0, 99)] == ROWS
    assert [row.values for row in source.read(3, 5)] == ROWS[3:5]
    assert source.where(5).endswith("train-00001-of-00002.parquet: row 2")
    assert source[-1].values == ROWS[-1]


def test_two_files_for_a_split_are_ambiguous(tmp_path):
    write(tmp_path, "jsonl")
    write(tmp_path, "csv")
    with pytest.raises(DataError, match="several files for 'train'"):
        open_source(tmp_path)


def test_a_missing_path_names_the_near_one(tmp_path):
    write(tmp_path, "jsonl")
    with pytest.raises(DataError, match=r"no such file or folder.*Did you mean train\.jsonl"):
        open_source(tmp_path / "tran.jsonl")


def test_a_hub_id_that_cannot_be_reached():
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match="neither a file or folder here nor a Hub data set"):
        open_source("someone/something")


def test_a_hub_data_set_is_read_through_datasets(monkeypatch):
    datasets = pytest.importorskip("datasets")
    kinds = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    table = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, 1]},
                                       features=datasets.Features(kinds))
    asked = []

    def load(repo, configuration, split):
        asked.append((repo, configuration, split))
        return table

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda repo, configuration: ["train", "validation"])
    monkeypatch.setattr(datasets, "load_dataset", load)
    source = open_source("someone/something:sub", "valid")
    assert asked == [("someone/something", "sub", "validation")]
    assert source.label_names == ("no", "yes")
    assert [row.values for row in source.read(1, 3)] == [{"text": "b", "label": 0}, {"text": "c", "label": 1}]
    assert source.where(0) == "someone/something:sub[validation]: row 1"
    assert available_splits("someone/something") == ("train", "valid")
    with pytest.raises(DataError, match="no split 'test'"):
        open_source("someone/something", "test")


def test_rows_in_memory():
    source = open_source([{"text": "a"}, {"text": "b", "more": 1}])
    assert source.columns == ("text", "more")
    assert available_splits([{"text": "a"}]) == ("train",)
    with pytest.raises(DataError, match="row 2: is str"):
        open_source([{"text": "a"}, "b"])
    with pytest.raises((DataError, ConfigError)):
        open_source([])


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_large_file_is_not_held_in_memory(tmp_path, kind):
    path = write(tmp_path, kind, [{"text": "x" * 4000, "n": str(i)} for i in range(5000)])
    assert path.stat().st_size > 20_000_000
    tracemalloc.start()
    source = open_source(path)
    for i in range(0, 5000, 7):
        assert source[i].values["n"] == str(i)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
