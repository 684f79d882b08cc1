"""One run of a study, in a process of its own: `python -m deltaw.compare.worker FOLDER`.

    train    as `run.json` says
    judge    the saved folder, loaded again as a user would, on the test data
    time     a forward pass of the base, with the change, and merged where it can be
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from statistics import median
from typing import Any

from deltaw.compare.study import SPEC, TUNED, Outcome, Run, write_outcome
from deltaw.errors import BaseModelError, ConfigError, DeltawError

NOT_APPLICABLE = (ConfigError, BaseModelError)
"""What a method that cannot be used on a model raises, before any training."""


def main(place: Path) -> int:
    """Do the run whose folder this is, and leave its outcome there; 130 where it was stopped."""
    spec = json.loads((place / SPEC).read_text(encoding="utf-8"))
    run = Run(**{field.name: spec[field.name] for field in fields(Run)})
    try:
        outcome = do(run, place, spec["identity"])
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        traceback.print_exc()
        known = isinstance(error, DeltawError)
        first = str(error) if known else f"{type(error).__name__}: {error}"
        outcome = Outcome(identity=spec["identity"], status="n/a" if isinstance(error, NOT_APPLICABLE) else "failed",
                          reason=" ".join(first.split()))
    write_outcome(place, outcome)
    return 0


def do(run: Run, place: Path, identity: str) -> Outcome:
    """Train, judge and time."""
    from deltaw.train.config import TrainConfig
    from deltaw.train.run import train

    tuned = place / TUNED
    config = TrainConfig.from_dict({**run.train, **data_of(run, place), "out": str(tuned), "samples": 0,
                                    "resume": True})
    decides = config.keep_best not in (None, "loss")  # a metric of the held-out rows: it has to be measured on them
    result = train(config if run.test is None or decides else replace(config, metrics=()), quiet=True)
    figures: Mapping[str, float] = result.after
    rows = int(result.data.get("valid_rows", 0))
    latency: dict[str, float] = {}
    if run.test is not None or run.latency:
        from deltaw.compare.judge import judge

        judged = judge(run, config, tuned, result.data.get("labels"))
        latency = dict(judged.latency)
        if judged.figures:
            figures, rows = judged.figures, judged.rows
    curve = tuple((int(row["step"]), float(row["loss"])) for row in result.curve if row.get("event") == "eval")
    return Outcome(identity=identity, status="done", figures=dict(figures), rows=rows,
                   parameters=result.trained_parameters, base_parameters=result.base_parameters,
                   bytes=result.adapter_bytes, peak_memory=result.peak_memory, steps=result.steps, curve=curve,
                   step_seconds=step_seconds(result.curve), latency=latency)


def step_seconds(curve: Sequence[Mapping[str, Any]]) -> float:
    """The median time of a step; a machine that does something else for a while does not count."""
    ends = [float(row["seconds"]) for row in curve if row.get("event") == "step"]
    return median(after - before for before, after in zip([0.0, *ends], ends, strict=False)) if ends else 0.0


def data_of(run: Run, place: Path) -> dict[str, Any]:
    """The data to train on and the held-out data: where the run may see only so many examples, a file of them.

    They are the first of one order that depends on the seed alone, so that 100 examples are part of the 1,000.
    """
    data, valid = str(run.train["data"]), run.train.get("valid")
    if run.size is None:
        return {}
    import random

    from deltaw.data import available_splits, open_source

    source = open_source(data, "train")
    order = list(range(len(source)))
    random.Random(run.seed).shuffle(order)
    file = place / "examples.jsonl"
    rows = [dict(source[index].values) for index in sorted(order[:run.size])]
    file.write_text("".join(json.dumps(row, default=_plain) + "\n" for row in rows), encoding="utf-8")
    return {"data": str(file), "valid": data if valid is None and "valid" in available_splits(data) else valid}


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
