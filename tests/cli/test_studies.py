"""`deltaw compare` and `deltaw sweep` as a person uses them, on a tiny model, each run a process of its own."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from deltaw.cli import compare as compare_verb
from deltaw.cli.parser import UsageError
from deltaw.cli.studies import show, study_config
from deltaw.compare import StudyResult
from deltaw.compare.config import CompareConfig
from deltaw.compare.noise import measured
from deltaw.compare.table import Row

Deltaw = Callable[..., tuple[int, str, str]]
SHORT = ["--max-steps", "6", "--batch-size", "4", "--learning-rate", "0.02", "--eval-rows", "4", "--device", "cpu",
         "--dtype", "fp32"]


@pytest.mark.slow
def test_compare_trains_judges_and_goes_on_where_it_stopped(deltaw: Deltaw, base: Path, rows: Path,
                                                            tmp_path: Path) -> None:
    out = tmp_path / "study"
    command = ["compare", "--model", base, "--data", rows, "--test", rows, "--out", out, "--methods", "lora,bitfit",
               "--seeds", "0,1", "--no-latency", "--paper", "e2e", *SHORT]
    code, text, log = deltaw(*command)
    assert code == 0, log
    assert "lora" in text
    assert "n/a" in text  # a Llama has no biases
    assert "2 runs together: lora, seed 0; lora, seed 1" in log
    assert "* of runs that trained in one process" in text
    assert "--together off measures each alone" in text
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "does not apply" in page
    assert "Table 3" in page
    assert "* of runs that trained in one process" in page
    code, text, log = deltaw(*command, "--json")
    assert code == 0
    assert log.count("done before") == 2
    result = json.loads(text)
    assert [row["arm"] for row in result["rows"]] == ["lora", "bitfit"]
    assert result["rows"][0]["figures"]["loss"]["n"] == 2


@pytest.mark.slow
def test_sweep_says_what_to_take_and_keeps_it(deltaw: Deltaw, base: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    code, text, log = deltaw("sweep", "--model", base, "--data", rows, "--out", out, "--ranks", "1,4", "--seeds", "0",
                             "--rates", "0.02,1e-4", "--halving", "2", "--rungs", "2", *SHORT)
    assert code == 0, log
    assert "2 go on" in log
    assert "With one seed" in text
    assert "rate=0.0001" not in text  # halving left them behind
    assert (out / "best" / "adapter_model.safetensors").is_file()
    code, _, log = deltaw("generate", "--adapter", out / "best", "is the sky blue ?")
    assert code == 0, log


def test_options_of_the_runs_stand_beside_those_of_the_study(tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text('methods = ["lora", "bitfit"]\nseeds = [1, 2]\n[train]\nmodel = "m"\ndata = "d"\nout = "o"\n'
                    "epochs = 3.0\n[train.lora]\nr = 4\n[arms.small]\nlora = {r = 1}\n", encoding="utf-8")
    options = compare_verb.parser().parse(["--config", str(file), "--epochs", "2", "--lora-alpha", "9", "--seeds", "7"])
    config = study_config(options, CompareConfig)
    assert (config.methods, config.seeds, config.train.epochs) == (("lora", "bitfit"), (7,), 2.0)
    assert (config.train.lora.r, config.train.lora.lora_alpha) == (4, 9)
    assert config.arms == {"small": {"lora": {"r": 1}}}
    assert config.together == "auto"
    options = compare_verb.parser().parse(["--config", str(file), "--together", "off"])
    assert study_config(options, CompareConfig).together == "off"


def test_faults_of_a_study_name_the_option(deltaw: Deltaw) -> None:
    code, _, log = deltaw("sweep", "--model", "m", "--data", "d", "--out", "o", "--ranks", "0", "--scales", "half")
    assert code == 2
    assert "--ranks: got (0,)" in log
    assert "--scales: got 'half'" in log
    assert "Traceback" not in log


def test_faults_of_arms_are_usage_errors_before_anything_is_trained(deltaw: Deltaw, base: Path, rows: Path,
                                                                    tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text('[arms.a]\nmethod = "fulll"\n[arms.b]\nlearning_rate = -1\n', encoding="utf-8")
    shared = ["--model", base, "--data", rows, "--out", tmp_path / "study"]
    code, _, log = deltaw("compare", "--config", file, *shared)
    assert code == 2
    assert "arm 'a': TrainConfig.method: got 'fulll'" in log
    assert "arm 'b': TrainConfig.learning_rate: got -1" in log
    code, _, log = deltaw("sweep", *shared, "--targets", "q_porj,v_proj", "--ranks", "1")
    assert code == 2
    assert "arm 'q_porj r=1'" in log
    assert "Did you mean q_proj" in log
    code, _, log = deltaw("compare", *shared, "--num-beams", "4", "--metrics", "bleu")
    assert code == 2
    assert "--num-beams: got 4 without test data; expected --test with it" in log
    code, _, log = deltaw("compare", *shared, "--task", "seq-cls", "--metrics", "bleu")
    assert code == 2
    assert "--metrics: bleu is of written answers" in log
    assert not (tmp_path / "study").exists()


def test_an_unknown_key_of_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "study.json"
    values = {"metods": ["lora"], "train": {"model": "m", "data": "d", "out": "o"}}
    file.write_text(json.dumps(values), encoding="utf-8")
    options = compare_verb.parser().parse(["--config", str(file)])
    with pytest.raises(UsageError, match=r"'metods' is unknown.*Did you mean methods"):
        study_config(options, CompareConfig)


def test_what_has_no_figure_is_said_under_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    rows = (Row(arm="lora", figures={"accuracy": measured([0.9, 0.92])}, seeds=(0, 1), failed={2: "loss is NaN"}),
            Row(arm="bitfit", not_applicable="a Llama has no biases"), Row(arm="full", failed={0: "out of memory"}))
    result = StudyResult(kind="compare", folder="studies/mine", config={}, judged_by="accuracy", rows=rows, curves={})
    show(result, argparse.Namespace(), None, [])
    text = capsys.readouterr().out
    table = text[:text.index("bitfit does not apply: a Llama has no biases")]
    lines = {line.split()[0]: line for line in table.splitlines() if line.split()}
    assert "lora (1 of 3 seeds failed)" in lines["lora"]
    assert "accuracy, %" in table
    assert "91 ± 1.4" in lines["lora"]
    assert ("n/a" in lines["bitfit"], "failed" in lines["full"], "has no biases" in table) == (True, True, False)
    assert "lora, seed 2, failed: loss is NaN" in text
    assert "full, seed 0, failed: out of memory" in text
    show(StudyResult(kind="compare", folder="s", config={}, judged_by="loss", rows=rows[1:], curves={}),
         argparse.Namespace(), None, [])
    text = capsys.readouterr().out
    lines = {line.split()[0]: line for line in text[:text.index("bitfit does")].splitlines() if line.split()}
    assert ("n/a" in lines["bitfit"], "failed" in lines["full"]) == (True, True)  # though no arm has a figure
