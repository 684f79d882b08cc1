"""`deltaw train --jobs FILE`: many adapters over one base, from a jobs file; see `deltaw.train.jobs_file`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from deltaw.cli.options import option_name
from deltaw.cli.output import print_json, print_next, print_table
from deltaw.cli.parser import UsageError
from deltaw.errors import ConfigError, Fault, TrainingError

if TYPE_CHECKING:
    from deltaw.train.many_result import ManyResult

_BESIDE = ("jobs", "resume", "json", "debug", "report")


def run_jobs(options: argparse.Namespace) -> None:
    """Train the jobs of the file together; raises TrainingError, with a fault for each, if some failed."""
    given = vars(options)
    extra = [option_name(name) for name in given if name not in _BESIDE]
    if extra:
        raise UsageError(*(f"{name}: does not go with --jobs; put it into the jobs file" for name in extra))
    from deltaw.train.jobs_file import read_jobs

    try:
        found = read_jobs(given["jobs"], resume=given.get("resume"))
    except ConfigError as error:
        raise UsageError(*map(str, error.faults)) from error
    if found.together is None:
        raise UsageError(f"{given['jobs']}: 'together' is missing; expected at least its `out`, a folder for the set")
    from deltaw.train.many import train_many

    result = train_many(found.jobs, found.together)
    if given.get("report", True):
        _write_reports(result)
    if given.get("json"):
        print_json(result.to_dict())
    else:
        _show(result)
    failed = [Fault(f"job '{name}'", "failed: " + result.jobs[name].error.replace("\n", " "), remedy=_remedy(
        result.jobs[name].checkpoint)) for name in result.failed]
    if failed:
        raise TrainingError(*failed)


def _remedy(checkpoint: str | None) -> str:
    if checkpoint is None:
        return "Nothing was saved before"
    run = Path(checkpoint).parents[1]
    return f"Its state is in {checkpoint}; go on with the set with --resume, or alone with --config " \
           f"{run / 'train_config.json'} --resume"


def _write_reports(result: ManyResult) -> None:
    from deltaw.report import write_report

    for job in result.jobs.values():
        if job.result is not None:
            write_report(job.result, Path(job.result.adapter) / "report.html")


def _show(result: ManyResult) -> None:
    """A line for each job on stdout, and what to do next."""
    rows = []
    for name, job in result.jobs.items():
        run = job.result
        figures = ["", "", ""] if run is None else [f"{run.before['loss']:.4f}", f"{run.after['loss']:.4f}",
                                                    f"{run.tokens:,}"]
        rows.append([name, job.status, f"{job.steps}/{job.planned_steps}", *figures])
    print_table(f"{len(rows)} jobs, {result.rounds:,} rounds, {result.tokens:,} tokens in {result.seconds:,.0f} s",
                ("job", "status", "steps", "loss before", "loss after", "tokens"), rows)
    done = [job.result.adapter for job in result.jobs.values() if job.result is not None]
    if done:
        print_next([f"deltaw generate --adapter {done[0]} 'a prompt like those in your data'"])
