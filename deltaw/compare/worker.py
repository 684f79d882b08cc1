"""Runs of a study, in a process of their own: `python -m deltaw.compare.worker FOLDER...`; several train `together`.

    train    as `run.json` says; not again where that was done before and only the judging is another now
    judge    the saved folder, loaded again as a user would, on the test data
    time     a forward pass of the base, with the change, and merged where it can be
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from deltaw.compare.run import JUDGES, OUTCOME, SPEC, TOGETHER, TUNED, Outcome, Run, write_outcome
from deltaw.errors import DeltawError, TargetError

if TYPE_CHECKING:
    from deltaw.bases import Base
    from deltaw.compare.judge import Judged
    from deltaw.train.config import TrainConfig
    from deltaw.train.result import TrainResult

def main(places: Sequence[Path]) -> int:
    """Do the runs whose folders these are, and leave their outcomes there; 130 where that was stopped."""
    runs = {place: read_run(place) for place in places}
    try:
        for place, outcome in outcomes_of(runs):
            write_outcome(place, outcome)
    except KeyboardInterrupt:
        return 130
    return 0


def read_run(place: Path) -> Run:
    """The run that a folder is for."""
    spec = json.loads((place / SPEC).read_text(encoding="utf-8"))
    return Run(**{field.name: spec[field.name] for field in fields(Run)})


def outcomes_of(runs: Mapping[Path, Run]) -> Iterator[tuple[Path, Outcome]]:
    """What comes of each run."""
    if len(runs) > 1:
        from deltaw.compare.together import do_together

        yield from do_together(runs)
        return
    for place, run in runs.items():
        try:
            yield place, do(run, place)
        except Exception as error:
            traceback.print_exc()
            yield place, reason_of(run, error)


def do(run: Run, place: Path) -> Outcome:
    """Train, judge and time."""
    from deltaw.train.run import train

    config = config_of(run, place)
    trains = for_training(run, config)
    result = trained_before(trains) or train(trains, quiet=True)
    return outcome_of(run, result, judged(run, config, result), together=trained_with(place))


def config_of(run: Run, place: Path) -> TrainConfig:
    """The run's config; it goes on where its folder holds a checkpoint."""
    from deltaw.train.config import TrainConfig

    return TrainConfig.from_dict({**run.train, **data_of(run, place), "out": str(place / TUNED), "samples": 0,
                                  "resume": True})


def for_training(run: Run, config: TrainConfig) -> TrainConfig:
    """The config without metrics that nobody looks at: where test data decides, no answer to held-out rows is written.

    A metric that chooses the best step is measured on the held-out rows all the same. A run that was begun goes on with
    the metrics that it began with, which nothing but its log depends on.
    """
    decides = config.keep_best not in (None, "loss")
    config = config if run.test is None or decides else replace(config, metrics=())
    begun = begun_with(config)
    return config if begun is None else replace(config, **{name: begun[name] for name in JUDGES if name in begun})


def begun_with(config: TrainConfig) -> dict[str, Any] | None:
    """The options with which the run in the config's folder was begun; None where none was."""
    from deltaw.train.run import CONFIG_FILE

    try:
        found = json.loads((Path(config.out) / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def trained_before(config: TrainConfig) -> TrainResult | None:
    """The result of this very training, where it was brought to its end before.

    Options that came later than the result have to be what they are by default.
    """
    from deltaw.train.config import TrainConfig
    from deltaw.train.result import TrainResult
    from deltaw.train.run import RESULT_FILE

    file = Path(config.out) / RESULT_FILE
    try:
        found = TrainResult.from_dict(json.loads(file.read_text(encoding="utf-8")))
        usual = TrainConfig(model=config.model, data=config.data, out=config.out).to_dict()
        then = {name: {**value, **found.config[name]} if isinstance(value, dict) and name in found.config else value
                for name, value in usual.items()}
        then |= {name: value for name, value in found.config.items() if not isinstance(usual.get(name), dict)}
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return None if config.changes(then) else found


def judged(run: Run, config: TrainConfig, result: TrainResult, base: Base | None = None) -> Judged | None:
    """What the trained folder is worth, found on `base` where it is there; None where the held-out figures stand."""
    held_out = run.test is None and any(result.config.get(name) != value for name, value in config.to_dict().items()
                                        if name in JUDGES)
    if run.test is None and not run.latency and not held_out:
        return None
    from deltaw.compare.judge import judge

    return judge(run, config, Path(config.out), result.data.get("labels"), base=base, held_out=held_out)


def outcome_of(run: Run, result: TrainResult, judged: Judged | None, *, together: int) -> Outcome:
    """What came of a finished run."""
    figures, rows = result.after, int(result.data.get("valid_rows", 0))
    if judged is not None and judged.figures:
        figures, rows = judged.figures, judged.rows
    curve = tuple((int(row["step"]), float(row["loss"])) for row in result.curve if row.get("event") == "eval")
    return Outcome(identity=run.identity, status="done", figures=dict(figures), rows=rows,
                   parameters=result.trained_parameters, base_parameters=result.base_parameters,
                   bytes=result.adapter_bytes, peak_memory=result.peak_memory, steps=result.steps, curve=curve,
                   step_seconds=step_seconds(result.curve), together=together,
                   latency={} if judged is None else dict(judged.latency))


def reason_of(run: Run, error: Exception | str) -> Outcome:
    """Why a run came to nothing: a method that has nothing to apply to on the model is told from what went wrong."""
    text = str(error) if isinstance(error, (DeltawError, str)) else f"{type(error).__name__}: {error}"
    return Outcome(identity=run.identity, status="n/a" if isinstance(error, TargetError) else "failed",
                   reason=" ".join(text.split()))


def trained_with(place: Path) -> int:
    """How many runs shared the process in which this folder was trained, this one among them."""
    for file in (place / TOGETHER, place / OUTCOME):
        try:
            return int(json.loads(file.read_text(encoding="utf-8"))["together"])
        except (OSError, ValueError, TypeError, KeyError):
            continue
    return 1


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
    sys.exit(main([Path(place) for place in sys.argv[1:]]))
