"""Everything that can be wrong with a set of jobs, found before a weight is loaded: each fault names its job.

    values      the same base for all, a name and a folder of its own for each
    data        read and tokenised, once for jobs that share it
    targets     looked for in the base's shapes
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from deltaw import bases
from deltaw.errors import ConfigError, DataError, DeltawError, Fault, TargetError
from deltaw.inject import find_sites, resolve
from deltaw.train.config import TrainConfig
from deltaw.train.examples import Examples, examples_for, load_base, open_base
from deltaw.train.job import Job
from deltaw.train.run import check_folder

SHARED = ("model", "task", "device", "dtype", "quantize", "double_quant", "quantize_tables", "gradient_checkpointing",
          "threads", "packing")
"""Fields that belong to the base, and so to all jobs alike."""
_OF_DATA = ("data", "cache_data", "valid", "columns", "max_length", "train_on", "task", "eval_rows", "model")


def check_jobs(jobs: Sequence[Job], *, resume: bool, at_work: Collection[str] = ()) -> None:
    """Refuse jobs whose values do not fit each other, with every fault of every job.

    `at_work` names those that the set has begun or ended: what lies in their folders is their own.
    """
    if not jobs:
        raise ConfigError(Fault("jobs", "got none", "at least one"))
    faults: list[Fault | str] = []
    for kind, values in (("name", [job.name for job in jobs]),
                         ("out", [str(Path(job.config.out).expanduser().absolute()) for job in jobs])):
        faults += [Fault(f"job '{job.name}': {kind}", f"'{value}' is that of another job too", "its own for each job",
                         f"Give it another {kind}")
                   for number, (job, value) in enumerate(zip(jobs, values, strict=True)) if value in values[:number]]
    first = jobs[0].config
    for job in jobs[1:]:
        faults += [Fault(f"job '{job.name}': {field}", f"got {getattr(job.config, field)!r}",
                         f"{getattr(first, field)!r}, as in job '{jobs[0].name}': all share one base",
                         "Give it a set of its own, or the same value")
                   for field in SHARED if getattr(job.config, field) != getattr(first, field)]
    for job in jobs:
        if not (isinstance(job.priority, (int, float)) and 0 < job.priority < float("inf")):
            faults.append(Fault(f"job '{job.name}': priority", f"got {job.priority!r}", "a finite number above 0"))
        if job.config.method != "lora":
            faults.append(Fault(f"job '{job.name}': method", f"got '{job.config.method}'", "lora",
                                "Train it alone: it changes what the others share"))
        if job.config.compile == "on":
            faults.append(Fault(f"job '{job.name}': compile", "got 'on'", "auto or off",
                                "Layers are not compiled while adapters train together"))
        if job.name in at_work:
            continue
        try:
            check_folder(Path(job.config.out).expanduser(), replace(job.config, resume=resume or job.config.resume))
        except ConfigError as error:
            faults += of_job(job, error)
    if faults:
        raise ConfigError(*faults)


def load_jobs(jobs: Sequence[Job], base: bases.Base | None = None) -> tuple[bases.Base, dict[str, Examples]]:
    """The base and each job's examples; all faults of data and targets are raised before weights are loaded."""
    first = jobs[0].config
    opened = base if base is not None else open_base(first)
    loader = Loader(opened)
    sites = find_sites(opened.model) if base is None else None
    faults: dict[type[DeltawError], list[Fault | str]] = {}
    examples: dict[str, Examples] = {}
    for job in jobs:
        try:
            examples[job.name] = loader.examples(job.config)
        except (DataError, ConfigError) as error:
            faults.setdefault(DataError, []).extend(of_job(job, error))
        if sites is not None:
            try:
                resolve(job.config.lora, opened.model, sites)
            except ConfigError as error:
                faults.setdefault(TargetError, []).extend(of_job(job, error))
    if first.task == "seq-cls":
        labels = {name: e.train.label_names for name, e in examples.items()}
        faults.setdefault(DataError, []).extend(_of_other_labels(labels))
    found = [fault for several in faults.values() for fault in several]
    if found:
        raise next(kind for kind, several in faults.items() if several)(*found)
    return (base if base is not None else load_base(first, examples[jobs[0].name])), examples


class Loader:
    """Reads the data of jobs, each set of rows once."""

    def __init__(self, base: bases.Base) -> None:
        self.base = base
        self._known: list[Examples] = []

    def examples(self, config: TrainConfig) -> Examples:
        """The job's examples; those of another job with the same rows, where there is one."""
        for known in self._known:
            same = all(getattr(known.config, name) == getattr(config, name) for name in _OF_DATA)
            fixed = known.valid is not known.train  # rows that are held out by lot depend on the seed
            if same and (fixed or known.config.seed == config.seed):
                return replace(known, config=config)
        found = examples_for(config, self.base)
        self._known.append(found)
        return found


def of_job(job: Job, error: DeltawError) -> Iterator[Fault | str]:
    """The faults of an error, with the job's name before each."""
    for fault in error.faults:
        named = f"job '{job.name}': "
        yield replace(fault, where=named + fault.where) if isinstance(fault, Fault) else named + fault


def _of_other_labels(labels: dict[str, tuple[str, ...] | None]) -> list[Fault]:
    first = next(iter(labels.values()), None)
    return [Fault(f"job '{name}': data", f"has the labels {own}", f"{first}, as the first job: all share one base",
                  "Give it a set of its own") for name, own in labels.items() if own != first]
