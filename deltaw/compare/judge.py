"""The saved folder of a run, loaded as a user would load it: how good it is on test data, and how fast."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from deltaw import baselines, bases
from deltaw.baselines import Baseline
from deltaw.compare.run import Run
from deltaw.data import EncodedData, judged_split, load_data
from deltaw.train.beams import Beams
from deltaw.train.config import TrainConfig
from deltaw.train.decoding import device_of, finish
from deltaw.train.evaluation import evaluate, evaluating
from deltaw.train.examples import examples_for

BATCHES = (1, 16)
"""Rows of the forward passes that are timed: the smallest, where extra layers cost most, and a larger one."""
REPEATS, LONGEST = 9, 128


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What was found."""

    figures: Mapping[str, float] = field(default_factory=dict)
    rows: int = 0
    latency: Mapping[str, float] = field(default_factory=dict)


def judge(run: Run, config: TrainConfig, tuned_folder: Path, labels: list[str] | None, *,
          base: bases.Base | None = None, held_out: bool = False) -> Judged:
    """Figures on the run's test data, where it names any, and times of a forward pass, where it asks for them.

    `held_out` asks for figures on the rows that were held out of the training. A `base` that is loaded already is as it
    was afterwards.
    """
    if base is None:
        base = bases.load_base(config.model, task=config.task, dtype=config.dtype, labels=labels,
                               device=config.chosen_device(), double_quant=config.double_quant,
                               quantize_tables=config.quantize_tables,
                               quantize=None if config.quantize == "none" else config.quantize)
    held = examples_for(config, base) if held_out else None
    tuned = baselines.load(tuned_folder, base.model)
    try:
        figures: Mapping[str, float] = {}
        rows = 0
        if held is not None:
            figures, rows = measured(held.valid, held.valid_rows, config, base, Beams())
        elif run.test is not None:
            data = test_data(run.test, config, base, labels)
            figures, rows = measured(data, range(len(data))[:run.test_rows], config, base, Beams(**run.beams))
        return Judged(figures=figures, rows=rows, latency=times(tuned, base) if run.latency else {})
    finally:
        tuned.remove()


def measured(data: EncodedData, rows: Sequence[int], config: TrainConfig, base: bases.Base, beams: Beams
             ) -> tuple[Mapping[str, float], int]:
    """Figures of the model as it is on these rows, and how many rows that are."""
    found = evaluate(base.model, base.tokenizer, data, rows=rows, metrics=config.metrics, beams=beams,
                     batch_size=config.batch_size, max_new_tokens=config.max_new_tokens)
    return found.figures, found.rows


def test_data(source: str, config: TrainConfig, base: bases.Base, labels: list[str] | None) -> EncodedData:
    """The test data, read like the training data."""
    limit = base.max_positions
    return load_data(source, tokenizer=base.tokenizer, task=config.task, split=judged_split(source),
                     columns=config.columns or None, max_length=config.max_length or min(1024, limit or 1024),
                     model_limit=limit, train_on=config.train_on, labels=labels)


def times(tuned: Baseline, base: bases.Base) -> dict[str, float]:
    """Seconds of a forward pass of 128 tokens a row: the base, with the change, and merged where it merges (Table 1).

    The base and the changed model take turns, so that what else the machine does falls on both.
    """
    model, found = base.model, dict[str, float]()
    device = device_of(model)
    length = min(LONGEST, (base.max_positions or LONGEST) - tuned.takes)
    batches = {rows: torch.full((rows, length), 5, device=device) for rows in BATCHES}
    with evaluating(model):
        for rows, ids in batches.items():
            call = _pass(model, ids)
            found[f"base_{rows}"], found[f"tuned_{rows}"] = _in_turn(call, tuned)
        if tuned.board is not None and tuned.recipe.method == "lora":
            with tuned.board.merged("default"):
                for rows, ids in batches.items():
                    found[f"merged_{rows}"] = median(_seconds(_pass(model, ids)) for _ in range(REPEATS))
    return found


def _pass(model: Any, ids: torch.Tensor) -> Callable[[], None]:
    options: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.can_generate():
        # A step of decoding needs the last token alone: chosen by its place, since torch copies the weight of a 16-bit
        # layer for the strides of a slice.
        options |= {"use_cache": False, "logits_to_keep": torch.tensor([ids.shape[1] - 1], device=ids.device)}

    def call() -> None:
        model(**options)
        finish(ids.device)

    call()
    return call


def _in_turn(call: Callable[[], None], tuned: Baseline) -> tuple[float, float]:
    base, with_change = [], []
    for _ in range(REPEATS):
        with tuned.off():
            base.append(_seconds(call))
        with_change.append(_seconds(call))
    return median(base), median(with_change)


def _seconds(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
