"""LoRA runs of a study over one base in one process: counted, trained by `deltaw.train.many`, judged.

    count    the trained values of each, without weights: as many train at once as there is memory for
    train    each goes on from its own last checkpoint; one that cannot begin, or fails, is an outcome that says so
    judge    each saved folder, one after the other, on the base that they shared

Their figures are those of runs alone, within rounding. Peak memory is the process's, and the time of a step a run's
share of the passes by tokens: an outcome says of how many.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from deltaw.bases import Base
from deltaw.compare.run import TOGETHER, Outcome, Run, told
from deltaw.compare.worker import (
    config_of,
    for_training,
    judged,
    outcome_of,
    reason_of,
    trained_before,
    trained_with,
)
from deltaw.errors import DeltawError
from deltaw.inject import find_sites, resolve
from deltaw.plan.devices import available_memory
from deltaw.store.atomic import replace_text
from deltaw.train.config import TrainConfig
from deltaw.train.examples import open_base
from deltaw.train.job import Job, JobResult
from deltaw.train.many import TrainMany
from deltaw.train.many_config import ManyConfig
from deltaw.train.result import TrainResult

SHARE_OF_MEMORY = 0.25
"""Of what the process could hold, what adapters may take; the base, activations and evaluations have the rest."""
BYTES_PER_VALUE = 4 * 5
"""Of a trained value, in float32: itself, its gradient, two moments, and its best."""


def do_together(runs: Mapping[Path, Run]) -> Iterator[tuple[Path, Outcome]]:
    """Train and judge the runs of these folders; each outcome as soon as it is known."""
    configs, results = dict[Path, TrainConfig](), dict[Path, TrainResult]()
    for place, run in runs.items():
        try:
            configs[place] = config_of(run, place)
        except DeltawError as error:
            yield place, reason_of(run, error)
            continue
        before = trained_before(for_training(run, configs[place]))
        if before is not None:
            results[place] = before
    base: Base | None = None
    jobs = {place: Job(config=config) for place, config in named(configs, runs).items() if place not in results}
    for members in portions(jobs):
        base, ended = train_set(members, base)
        began = [place for place, end in ended.items() if isinstance(end, JobResult)]
        for place in began:
            replace_text(place / TOGETHER, json.dumps({"together": len(began)}))
        for place, end in ended.items():
            if isinstance(end, JobResult) and end.result is not None:
                results[place] = end.result
            else:
                yield place, reason_of(runs[place], end.error if isinstance(end, JobResult) else end)
    for place, result in results.items():
        try:
            outcome = outcome_of(runs[place], result, judged(runs[place], configs[place], result, base),
                                 together=trained_with(place))
        except Exception as error:  # one run that cannot be judged is no reason to lose the others
            outcome = reason_of(runs[place], error)
        yield place, outcome


def named(configs: Mapping[Path, TrainConfig], runs: Mapping[Path, Run]) -> dict[Path, TrainConfig]:
    """The configs with a name for each adapter, as the log's table shows it."""
    return {place: replace(for_training(runs[place], config), name=f"{number} {told(runs[place])}".replace(".", "_"))
            for number, (place, config) in enumerate(configs.items(), 1)}


def portions(jobs: Mapping[Path, Job]) -> Iterator[dict[Path, Job]]:
    """The jobs in parts that may be in memory at once, in their order.

    One with targets that are not there counts nothing here; it is told when it is to begin.
    """
    if not jobs:
        return
    model = open_base(next(iter(jobs.values())).config).model
    sites, room = find_sites(model), SHARE_OF_MEMORY * available_memory()
    part: dict[Path, Job] = {}
    taken = 0
    for place, job in jobs.items():
        try:
            values = sum(target.parameters for target in resolve(job.config.lora, model, sites))
        except DeltawError:
            values = 0
        if part and taken + BYTES_PER_VALUE * values > room:
            yield part
            part, taken = {}, 0
        part[place] = job
        taken += BYTES_PER_VALUE * values
    yield part


def train_set(jobs: Mapping[Path, Job], base: Base | None) -> tuple[Base | None, dict[Path, JobResult | Exception]]:
    """Train one part; the base for the next one, and how each job ended, or why it could not begin."""
    ended: dict[Path, JobResult | Exception] = {}
    with ExitStack() as stack:
        many: TrainMany | None = None
        out = stack.enter_context(tempfile.TemporaryDirectory())
        for place, job in jobs.items():
            try:
                if many is None:
                    many = stack.enter_context(TrainMany([job], ManyConfig(out=out, control=False), base=base))
                else:
                    many.add(job)
            except DeltawError as error:
                ended[place] = error
        if many is not None:
            base, result = many.base, many.run()
            ended |= {place: result.jobs[job.name] for place, job in jobs.items() if job.name in result.jobs}
    return base, ended
