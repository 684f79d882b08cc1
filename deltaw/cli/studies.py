"""What `compare` and `sweep` share: their options, their table and their exit."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from deltaw.baselines.config import BaselineConfig
from deltaw.cli.build import build, read_config_file
from deltaw.cli.main import VERBS
from deltaw.cli.options import add_options, given
from deltaw.cli.output import print_json, print_next, print_table
from deltaw.cli.parser import Parser, UsageError
from deltaw.cli.train import METAVARS
from deltaw.compare.config import CompareConfig, StudyConfig, SweepConfig
from deltaw.core.config import LoraConfig
from deltaw.errors import near
from deltaw.train.beams import Beams
from deltaw.train.config import TrainConfig

if TYPE_CHECKING:
    from deltaw.compare import StudyResult

_NOT_SHARED = ("lora", "baseline", "name", "seed", "resume", "method", "samples")
"""Options of a run that a study sets itself."""
Config = TypeVar("Config", bound=StudyConfig)


def study_parser(verb: str, config: type[StudyConfig], epilog: str) -> Parser:
    """The study's own options, then those that its runs share."""
    made = Parser(verb, VERBS[verb], usage=f"{verb} --model MODEL --data DATA --out FOLDER [OPTIONS]", epilog=epilog)
    add_options(made, config, "The study", skip=("train", "arms", "baseline", "beams"),
                metavars={"test": "DATA", "judge": "NAME", "methods": "NAME,...", "targets": "NAME+NAME,...",
                          "scales": "RULE,..."})
    add_options(made, Beams, "Answers to the test data")
    add_options(made, TrainConfig, "Every run", skip=_NOT_SHARED, metavars=METAVARS)
    add_options(made, LoraConfig, "Every adapter", skip=("r",) if config is SweepConfig else ())
    if config is CompareConfig:
        add_options(made, BaselineConfig, "Every other method")
    group = made.add_argument_group("Files")
    further = ", those of other methods under `baseline`, further arms under `arms`" if config is CompareConfig else ""
    group.add_argument("--config", metavar="FILE", help="Take options from a .json or .toml file with the names above: "
                       f"those of the runs under `train`, those of the adapter under `train.lora`{further}.")
    made.add_general_options()
    return made


def study_config(options: argparse.Namespace, config: type[Config]) -> Config:
    """The config that a command line asks for; `UsageError` with all that is wrong with it."""
    file = vars(options).get("config")
    values = read_config_file(file) if file else {}
    train = values.pop("train", {})
    lora = train.get("lora", {}) if isinstance(train, Mapping) else {}
    if not isinstance(train, Mapping) or not isinstance(lora, Mapping):
        raise UsageError(f"{file}: train and train.lora are expected to be objects with options")
    shared = {**train, **given(options, TrainConfig), "lora": {**lora, **given(options, LoraConfig)}}
    values["beams"] = {**values.get("beams", {}), **given(options, Beams)}
    if config is CompareConfig:
        values["baseline"] = {**values.get("baseline", {}), **given(options, BaselineConfig)}

    def make_run(**run: Any) -> TrainConfig:
        return TrainConfig.from_dict(run)

    own = {**values, **given(options, config), "train": build(make_run, shared, file=file)}
    known = [field.name for field in fields(config)]
    unknown = [name for name in own if name not in known]
    if unknown:
        raise UsageError(*(f"{file}: '{name}' is unknown. {near(name, known)}".rstrip() for name in unknown))
    for name, value in own.items():
        if isinstance(value, list):
            own[name] = tuple(value)
    return build(config, own, file=file)


def show(result: StudyResult, options: argparse.Namespace, page: Path | None, commands: Sequence[str]) -> None:
    """The table, what to take, and what to do next; or one JSON object."""
    if vars(options).get("json"):
        print_json(result.to_dict() | {"report": str(page) if page else None})
        return
    from deltaw.compare.columns import study_columns

    table = study_columns(result.rows, result.judged_by)
    print_table(f"{result.kind}: {Path(result.folder).name}", table.headings,
                [[cell if isinstance(cell, str) else cell.text for cell in row] for row in table.rows])
    for note in table.notes:
        print(note)
    for row in result.rows:
        if row.not_applicable:
            print(f"{row.arm} does not apply: {row.not_applicable}")
        for seed, why in row.failed.items():
            print(f"{row.arm}, seed {seed}, failed: {why}")
    if result.advice is not None:
        print(result.advice.text)
    print_next(commands, page)
