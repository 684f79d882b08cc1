"""Held-out figures: loss, and how often the answers are right; for training and for `deltaw eval` alike.

    loss           mean over supervised tokens (rows, for a classifier)
    perplexity     exp of the loss
    exact_match    share of answers that equal the expected text, white space around it apart
    accuracy, ...  the figures of `metrics.CHOICE_METRICS`; a language model chooses, among the answers that occur in
                   the data, the one with the largest Σ log p(token)
    bleu, ...      the figures of `metrics.TEXT_METRICS`; rows with the same prompt are references of one input
    execution      share of queries that return what the expected ones return; each row names its database or table
    a function     of (predictions, references): texts, or class numbers for a classifier

The model is used as it is: with whatever adapter is on, in evaluation mode.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from deltaw.bases import stop_tokens
from deltaw.data import EncodedData, Example, LabelledExample, Prompt, collate
from deltaw.errors import ConfigError, Fault
from deltaw.train.beams import Beams
from deltaw.train.decoding import decode, device_of, generate, score_choices
from deltaw.train.figures import Metric, metric_name
from deltaw.train.metrics import CHOICE_METRICS, EXECUTION, PERPLEXITY, TEXT_METRICS, expand, text_figure
from deltaw.train.metrics.choices import accuracy, choice_figure
from deltaw.train.metrics.execution import databases_of, execution_accuracy
from deltaw.train.objective import IGNORED, CausalLoss, ClassLoss

MOST_CHOICES = 32
"""Different answers above which choosing among them is refused: each is scored on each row."""


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """Figures on held-out rows."""

    loss: float
    """Mean loss of a supervised token, or of a row for a classifier."""
    units: int
    """Supervised tokens, or rows."""
    rows: int
    """Rows evaluated."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The other figures by name."""
    seconds: float = 0.0
    """Time it took."""

    @property
    def figures(self) -> dict[str, float]:
        """The loss and the other figures."""
        return {"loss": self.loss, **self.metrics}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**self.figures, "units": self.units, "rows": self.rows, "seconds": round(self.seconds, 3)}


def evaluate(model: nn.Module, tokenizer: Any, data: EncodedData, *, rows: Sequence[int] | None = None,
             metrics: Sequence[str | Metric] = (), batch_size: int = 8, max_new_tokens: int = 64,
             beams: Beams | None = None) -> EvalResult:
    """Loss and metrics of `model` on the given rows of `data` (all by default); `beams` is how answers are searched.

    Raises ConfigError where a metric does not fit the data.
    """
    began = time.perf_counter()
    chosen = list(range(len(data))) if rows is None else [int(row) for row in rows]
    asked = expand(metrics)
    metrics = [metric for metric in asked if metric != PERPLEXITY]
    with evaluating(model):
        if data.label_names is not None:
            loss, predictions = _classify(model, tokenizer, data, chosen, batch_size)
            found = _metrics_of_classes(metrics, predictions, [_label(data, row) for row in chosen], data.label_names)
            units = len(chosen)
        else:
            loss, units = _causal_loss(model, tokenizer, data, chosen, batch_size)
            found = _metrics_of_texts(model, tokenizer, data, chosen, metrics, batch_size, max_new_tokens, beams)
    if PERPLEXITY in asked:
        found = {PERPLEXITY: math.exp(min(loss, 700.0)), **found}
    return EvalResult(loss=loss, units=units, rows=len(chosen), metrics=found, seconds=time.perf_counter() - began)


def answers(model: nn.Module, tokenizer: Any, data: EncodedData, rows: Sequence[int], *, max_new_tokens: int = 64,
            batch_size: int = 8, beams: Beams | None = None) -> list[str]:
    """What the model writes after the prompts of these rows, without special tokens; each prompt is answered once."""
    stop = stop_tokens(model, tokenizer, [_tail(data, row) for row in rows])
    prompts = [tuple(data.prompt(row).input_ids) for row in rows]
    different = list(dict.fromkeys(prompts))
    with evaluating(model):
        written = generate(model, tokenizer, different, max_new_tokens=max_new_tokens, batch_size=batch_size, stop=stop,
                           beams=beams)
    texts = {prompt: decode(tokenizer, tokens) for prompt, tokens in zip(different, written, strict=True)}
    return [texts[prompt] for prompt in prompts]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients for the length of the block; then the mode from before."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _causal_loss(model: nn.Module, tokenizer: Any, data: EncodedData, rows: Sequence[int],
                 batch_size: int) -> tuple[float, int]:
    objective, total, units = CausalLoss(), 0.0, 0
    for batch in _batches(model, tokenizer, data, rows, batch_size):
        total += objective.loss(model, batch).item()
        units += objective.units(batch)
    return total / units, units


def _classify(model: nn.Module, tokenizer: Any, data: EncodedData, rows: Sequence[int],
              batch_size: int) -> tuple[float, list[int]]:
    """The mean loss, and the likeliest class of each row."""
    objective, total = ClassLoss(), 0.0
    predictions: dict[int, int] = {}
    ordered = _by_length(data, rows)
    for start, batch in zip(range(0, len(ordered), batch_size), _batches(model, tokenizer, data, rows, batch_size),
                            strict=True):
        logits = objective.logits(model, batch).float()
        total += float(nn.functional.cross_entropy(logits, batch["labels"], reduction="sum"))
        predictions |= zip(ordered[start:start + batch_size], logits.argmax(-1).tolist(), strict=True)
    return total / len(rows), [predictions[row] for row in rows]


def _metrics_of_classes(metrics: Sequence[str | Metric], predictions: Sequence[int], references: Sequence[int],
                        names: Sequence[str]) -> dict[str, float]:
    """Functions get the classes' numbers; correlations the names, which must be numbers."""
    found: dict[str, float] = {}
    for metric in metrics:
        if not isinstance(metric, str):
            found[metric_name(metric)] = float(metric(predictions, references))
        elif metric in TEXT_METRICS or metric == EXECUTION:
            raise ConfigError(Fault("metrics", f"{metric} is of written answers, and this model chooses labels",
                                    "exact_match, " + ", ".join(CHOICE_METRICS)))
        else:
            kind = "accuracy" if metric == "exact_match" else metric
            found[metric] = choice_figure(kind, [names[p] for p in predictions], [names[r] for r in references])
    return found


def _metrics_of_texts(model: nn.Module, tokenizer: Any, data: EncodedData, rows: Sequence[int],
                      metrics: Sequence[str | Metric], batch_size: int, max_new_tokens: int,
                      beams: Beams | None) -> dict[str, float]:
    if not metrics:
        return {}
    databases = databases_of(data, rows) if EXECUTION in metrics else []  # before anything is written
    references = [data.prompt(row).answer.strip() for row in rows]
    found: dict[str, float] = {}
    written, chosen = list[str](), list[str]()
    for metric in metrics:
        if metric in CHOICE_METRICS:
            chosen = chosen or _likeliest(model, tokenizer, data, rows, batch_size)
            found[str(metric)] = choice_figure(str(metric), chosen, references)
            continue
        written = written or [text.strip() for text in answers(
            model, tokenizer, data, rows, max_new_tokens=max_new_tokens, batch_size=batch_size, beams=beams)]
        if isinstance(metric, str) and metric in TEXT_METRICS:
            label, score = text_figure(metric, *_by_prompt(data, rows, written, references))
            found[label] = score
        elif metric == EXECUTION:
            found[EXECUTION] = execution_accuracy(written, references, databases)
        else:
            found[metric_name(metric)] = float((accuracy if isinstance(metric, str) else metric)(written, references))
    return found


def _by_prompt(data: EncodedData, rows: Sequence[int], written: Sequence[str],
               references: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """The answer to each different prompt, and the expected texts of all rows that have it."""
    answer: dict[tuple[int, ...], str] = {}
    expected: dict[tuple[int, ...], list[str]] = {}
    for row, text, reference in zip(rows, written, references, strict=True):
        prompt = tuple(data.prompt(row).input_ids)
        answer[prompt] = text
        expected.setdefault(prompt, []).append(reference)
    return list(answer.values()), list(expected.values())


def _likeliest(model: nn.Module, tokenizer: Any, data: EncodedData, rows: Sequence[int], batch_size: int) -> list[str]:
    """For each row the likeliest of the different answers that the rows have."""
    prompts: list[Prompt] = [data.prompt(row) for row in rows]
    tails: dict[str, list[int]] = {}
    for row, prompt in zip(rows, prompts, strict=True):
        tails.setdefault(prompt.answer.strip(), _tail(data, row))
    if not 2 <= len(tails) <= MOST_CHOICES:
        raise ConfigError(Fault("metrics", f"{' and '.join(CHOICE_METRICS)} choose among the answers of the held-out "
                                f"rows, which have {len(tails)} different ones", f"2 to {MOST_CHOICES}",
                                "Use exact_match"))
    scores = score_choices(model, tokenizer, [prompt.input_ids for prompt in prompts], list(tails.values()),
                           batch_size=batch_size)
    names = list(tails)
    return [names[best] for best in scores.argmax(-1).tolist()]


def _tail(data: EncodedData, row: int) -> list[int]:
    """The tokens of a row from its last answer on, up to the token that ends it.

    What a chat template writes after that, a line break, is not learned, and its likelihood would be noise.
    """
    example = data[row]
    assert isinstance(example, Example)
    start = len(data.prompt(row).input_ids)
    end = max((i + 1 for i, label in enumerate(example.labels) if label != IGNORED), default=start)
    return example.input_ids[start:end]


def _label(data: EncodedData, row: int) -> int:
    example = data[row]
    assert isinstance(example, LabelledExample)
    return example.label


def _by_length(data: EncodedData, rows: Sequence[int]) -> list[int]:
    """The rows, those of similar length together, so that little is padded."""
    lengths = data.lengths
    return sorted(rows, key=lambda row: int(lengths[row]))


def _batches(model: nn.Module, tokenizer: Any, data: EncodedData, rows: Sequence[int],
             batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
    device, ordered = device_of(model), _by_length(data, rows)
    for start in range(0, len(ordered), batch_size):
        batch = collate([data[row] for row in ordered[start:start + batch_size]], tokenizer.pad_token_id)
        yield {name: tensor.to(device) for name, tensor in batch.items()}
