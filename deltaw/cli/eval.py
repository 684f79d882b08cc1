"""`deltaw eval`: held-out figures of a base, and of an adapter on it, side by side."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from deltaw.cli.build import build
from deltaw.cli.main import VERBS
from deltaw.cli.models import (
    METAVARS,
    ModelOptions,
    Opened,
    is_classifier,
    open_model,
    read_tuned,
    recorded_base,
    training_facts,
)
from deltaw.cli.options import add_options, given
from deltaw.cli.output import print_json, print_table, say
from deltaw.cli.parser import Parser, UsageError
from deltaw.errors import ConfigError, Fault, near
from deltaw.train.beams import Beams
from deltaw.train.metrics import METRICS, PERPLEXITY, SETS

if TYPE_CHECKING:
    from deltaw.baselines import SavedBaseline
    from deltaw.core import Adapter
    from deltaw.data import EncodedData

EPILOG = """\
What is not given (columns, max-length, metrics, ...) is as in the adapter's training.

  deltaw eval --adapter adapters/mine --data test.jsonl
  deltaw eval --model my/base --data test.jsonl --metrics exact_match --json
  deltaw eval --adapter adapters/e2e --data test.csv --columns prompt=mr,completion=ref --eval-rows none \\
      --metrics e2e --num-beams 10 --length-penalty 0.9 --no-repeat-ngram-size 4
"""
_NAMES = (*METRICS, PERPLEXITY, *SETS)


@dataclass(frozen=True, kw_only=True)
class EvalOptions(ModelOptions):
    """What to measure, and on what."""

    data: str
    """Examples, as for `deltaw train`: a file, a folder with train/valid/test, or a Hub data set id."""
    adapter: str | None = None
    """The adapter: its folder or a Hub id; by default the base alone is measured."""
    split: Literal["train", "valid", "test"] | None = None
    """Which part of the data; by default test, else valid, else train, whichever comes first."""
    columns: Mapping[str, str] | None = None
    """Which column of the data plays which role, as for `deltaw train`."""
    metrics: tuple[str, ...] | None = None
    """exact_match, perplexity; of choices accuracy, f1, matthews, pearson, spearman; of texts bleu, nist, meteor,
    rouge1, rouge2, rougeL, cider; of SQL logical_form, execution; or the sets rouge and e2e. By default those of the
    training, else exact_match or accuracy where they fit."""
    max_length: int | None = None
    """Longest example in tokens; by default as in the training, else what the model takes, at most 1024."""
    train_on: Literal["completion", "all"] | None = None
    """Count the loss of the answers only, or of every token; by default as in the training."""
    eval_rows: int | None = 200
    """Rows to evaluate on, the first ones; none for all."""
    batch_size: int = 8
    """Examples per forward pass."""
    max_new_tokens: int | None = None
    """Longest answer, in tokens, that is written; by default as in the training, else 64."""
    threads: int | None = None
    """CPU threads; by default one for each core."""
    labels: tuple[str, ...] = field(default=())
    """The classes of a classifier in the order of its outputs; by default as in the training."""

    def __post_init__(self) -> None:
        faults = [Fault(f"EvalOptions.{name}", f"got {value}", "a whole number >= 1") for name in
                  ("max_length", "eval_rows", "batch_size", "max_new_tokens", "threads")
                  if (value := getattr(self, name)) is not None and value < 1]
        faults += [Fault("EvalOptions.metrics", f"got '{name}'", "of " + ", ".join(_NAMES), near(name, _NAMES))
                   for name in self.metrics or () if name not in _NAMES]
        if faults:
            raise ConfigError(*faults)


def parser() -> Parser:
    """The model, the data and the figures."""
    made = Parser("eval", VERBS["eval"], usage="eval [--model MODEL] [--adapter FOLDER] --data DATA [OPTIONS]",
                  epilog=EPILOG)
    add_options(made, EvalOptions, "What to measure",
                metavars={**METAVARS, "metrics": "NAME,...", "labels": "NAME,..."})
    add_options(made, Beams, "How answers are written")
    made.add_general_options()
    return made


def run(options: argparse.Namespace) -> None:
    """Measure the base, then the adapter, on the same rows."""
    values = given(options, EvalOptions)
    if "data" not in values:
        raise UsageError("--data: is missing; expected a file, a folder or a Hub data set id")
    config = build(EvalOptions, values)
    beams = build(Beams, given(options, Beams))
    adapter = read_tuned(config.adapter) if config.adapter is not None else None
    if adapter is None and config.model is None:
        raise UsageError("--model: is missing; expected a base, or an --adapter that records its base")
    if config.threads is not None:
        import torch

        torch.set_num_threads(config.threads)
    opened, data = open_both(config, adapter)
    rows = range(len(data))[:config.eval_rows]
    figures = {"base": measure(opened, data, rows, config, adapter, beams)}
    if adapter is not None:
        opened.use("adapter")
        figures["adapter"] = measure(opened, data, rows, config, adapter, beams)
    if vars(options).get("json"):
        print_json({"model": opened.base.source, "adapter": config.adapter, "data": data.source.name, "rows": len(rows),
                    **{f"{name}_figures": found for name, found in figures.items()}})
        return
    from deltaw.train.summary import figure

    names = [name for name in figures["base"] if name not in ("units", "rows", "seconds")]
    print_table(f"{data.source.name}, {len(rows):,} examples", ["", *figures],
                [[name, *(figure(name, found[name]) for found in figures.values())] for name in names])


def open_both(config: EvalOptions, adapter: Adapter | SavedBaseline | None) -> tuple[Opened, EncodedData]:
    """The base with the adapter on it, and the data as it was tokenised in the adapter's training."""
    adapters = {"adapter": adapter} if adapter is not None else {}
    if not is_classifier(adapter):
        opened = open_model(config, adapters)
        return opened, encode(config, adapter, opened.base, None)
    from deltaw import bases

    labels = list(config.labels) or training_facts(adapter).get("labels")
    if not labels:
        raise ConfigError(Fault("--labels", "are not given, and the adapter does not record them",
                                "the classes in the order of its outputs"))
    meta = bases.load_base(config.model or recorded_base(adapters), task="seq-cls", labels=labels, device="meta")
    data = encode(config, adapter, meta, labels)
    return open_model(config, adapters, task="seq-cls", labels=labels), data


def encode(config: EvalOptions, adapter: Adapter | SavedBaseline | None, base: Any,
           labels: list[str] | None) -> EncodedData:
    """The examples as tokens."""
    from deltaw.data import judged_split, load_data

    trained = training_facts(adapter)
    task: Literal["causal-lm", "seq-cls"] = "causal-lm" if labels is None else "seq-cls"
    limit = base.max_positions
    if limit is not None and labels is not None and adapter is not None:  # that base was opened without the adapter
        limit -= getattr(adapter, "takes_positions", 0)
    length = config.max_length or min(trained.get("max_length") or 1024, limit or 1024)
    columns = trained.get("columns") if config.columns is None else config.columns
    return load_data(config.data, tokenizer=base.tokenizer, task=task, columns=columns or None,
                     split=config.split or judged_split(config.data), max_length=length, model_limit=limit,
                     labels=labels, train_on=config.train_on or trained.get("train_on") or "completion")


def measure(opened: Opened, data: EncodedData, rows: range, config: EvalOptions,
            adapter: Adapter | SavedBaseline | None, beams: Beams) -> dict[str, Any]:
    """The figures of the model as it is now."""
    from deltaw.train.evaluation import evaluate

    trained = training_facts(adapter)
    metrics = config.metrics if config.metrics is not None else tuple(
        name for name in trained.get("metrics") or () if name in METRICS) or _fitting(data)
    say(f"evaluating {'the adapter' if opened.is_on else 'the base'}")
    return evaluate(opened.base.model, opened.base.tokenizer, data, rows=rows, metrics=metrics,
                    batch_size=config.batch_size,
                    max_new_tokens=config.max_new_tokens or trained.get("max_new_tokens") or 64,
                    beams=beams).to_dict()


def _fitting(data: EncodedData) -> tuple[str, ...]:
    """The metric that fits rows of this shape: none for plain text, which has nothing to answer."""
    if data.label_names is not None:
        return ("accuracy",)
    return () if data.shape == "text" else ("exact_match",)
