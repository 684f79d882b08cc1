"""`deltaw compare`: tuning methods side by side on one task, several seeds each."""

from __future__ import annotations

import argparse
from pathlib import Path

from deltaw.cli.build import build
from deltaw.cli.parser import Parser
from deltaw.cli.studies import show, study_config, study_parser
from deltaw.compare.config import CompareConfig
from deltaw.errors import TrainingError

EPILOG = """\
LoRA runs train together in one process, others in one each. None is done again: the same command goes on where it
was stopped.

  deltaw compare --model my/base --data train.jsonl --test test.jsonl --out studies/mine --metrics exact_match
  deltaw compare --config study.toml --methods lora,full,bitfit,adapter-h --seeds 0,1,2
  deltaw compare --config study.toml --sizes 100,1000,0
"""


def parser() -> Parser:
    """The study's options, and those of every run."""
    return study_parser("compare", CompareConfig, EPILOG)


def run(options: argparse.Namespace) -> None:
    """Train and judge all arms, write the page, show the table."""
    config = study_config(options, CompareConfig)
    from deltaw.compare import compare
    from deltaw.report.comparison import study_page
    from deltaw.report.page import write_page

    result = build(compare, {"config": config})  # an arm that does not fit the base is a fault of the options
    page = write_page(study_page(result), Path(result.folder) / "report.html")
    show(result, options, page, [])
    if not any(row.figures for row in result.rows):
        raise TrainingError("no run of this study was finished")
