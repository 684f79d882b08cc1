"""Figures of one choice for each row: classes, or numbers where a correlation is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deltaw.train.metrics.needed import needed
from deltaw.train.metrics.text import numbers


def choice_figure(name: str, predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """One of `CHOICE_METRICS`; a correlation of choices that are all alike is 0, as is their Matthews coefficient."""
    if name == "accuracy":
        return accuracy(predictions, references)
    if name == "f1":
        return macro_f1(predictions, references)
    if name == "matthews":
        classes = {value: number for number, value in enumerate(sorted({*predictions, *references}))}
        sides = [[classes[value] for value in side] for side in (references, predictions)]
        return float(needed("sklearn.metrics", name).matthews_corrcoef(*sides)) if len(classes) > 1 else 0.0
    written, wanted = numbers(predictions, name), numbers(references, name)
    if len(set(written)) < 2 or len(set(wanted)) < 2:
        return 0.0
    stats = needed("scipy.stats", name)
    return float((stats.pearsonr if name == "pearson" else stats.spearmanr)(written, wanted).statistic)


def accuracy(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """The share of predictions that equal their reference."""
    right: int = sum(p == r for p, r in zip(predictions, references, strict=True))
    return right / len(references)


def macro_f1(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """The mean over classes (of either side) of F1 = 2·tp / (predicted + actual)."""
    classes = sorted(set(predictions) | set(references))
    scores: list[float] = []
    for cls in classes:
        right: int = sum(p == r == cls for p, r in zip(predictions, references, strict=True))
        scores.append(2 * right / (sum(p == cls for p in predictions) + sum(r == cls for r in references)))
    return sum(scores) / len(scores)
