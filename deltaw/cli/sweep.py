"""`deltaw sweep`: ranks, target sets, scales and rates of LoRA, crossed; which to take, with the evidence."""

from __future__ import annotations

import argparse
from pathlib import Path
from shlex import quote

from deltaw.cli.build import build
from deltaw.cli.parser import Parser
from deltaw.cli.studies import show, study_config, study_parser
from deltaw.compare.config import SweepConfig
from deltaw.errors import TrainingError

EPILOG = """\
LoRA runs train together in one process, others in one each. None is done again: the same command goes on where it
was stopped.

  deltaw sweep --model my/base --data train.jsonl --out studies/ranks --ranks 1,2,4,8,64 --targets q_proj,q_proj+v_proj
  deltaw sweep --config study.toml --budget 500000 --targets q_proj,v_proj,q_proj+v_proj,all-linear
  deltaw sweep --config study.toml --ranks 1,2,4,8,16,32,64 --rates 1e-4,5e-4,2e-3 --halving 3
"""


def parser() -> Parser:
    """The study's options, and those of every run."""
    return study_parser("sweep", SweepConfig, EPILOG)


def run(options: argparse.Namespace) -> None:
    """Train and judge the grid, keep the best adapter, write the page, show the table."""
    config = study_config(options, SweepConfig)
    from deltaw.compare import sweep
    from deltaw.report.comparison import study_page
    from deltaw.report.page import write_page

    result = build(sweep, {"config": config})  # an arm that does not fit the base is a fault of the options
    page = write_page(study_page(result), Path(result.folder) / "report.html")
    adapter = quote(result.best) if result.best else ""
    show(result, options, page, [f"deltaw generate --adapter {adapter} 'a prompt like those in your data'",
                                 f"deltaw analyse {adapter}"] if adapter else [])
    if not any(row.figures for row in result.rows):
        raise TrainingError("no run of this study was finished")
