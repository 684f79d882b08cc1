"""Figures of choices against the formulas, and against the libraries' own functions on other forms of the data."""

from __future__ import annotations

import math

import pytest

from deltaw.errors import ConfigError
from deltaw.train.metrics.choices import choice_figure

WANTED = ["yes", "yes", "no", "no", "no", "yes", "no"]
CHOSEN = ["yes", "no", "no", "no", "yes", "yes", "no"]


def test_matthews_is_its_formula() -> None:
    tp, tn, fp, fn = 2, 3, 1, 1
    expected = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert choice_figure("matthews", CHOSEN, WANTED) == pytest.approx(expected)


def test_accuracy_and_f1() -> None:
    assert choice_figure("accuracy", CHOSEN, WANTED) == pytest.approx(5 / 7)
    assert choice_figure("f1", CHOSEN, WANTED) == pytest.approx((2 / 3 + 3 / 4) / 2)


def test_correlations_are_of_the_numbers() -> None:
    x, y = ["1.0", "2.0", "3.5", "5"], ["1", "3", "2", "10"]
    a, b = [float(v) for v in x], [float(v) for v in y]
    mean = sum(a) / 4, sum(b) / 4
    inner = sum((p - mean[0]) * (q - mean[1]) for p, q in zip(a, b, strict=True))
    norms = math.sqrt(sum((p - mean[0]) ** 2 for p in a) * sum((q - mean[1]) ** 2 for q in b))
    assert choice_figure("pearson", x, y) == pytest.approx(inner / norms)
    assert choice_figure("spearman", x, y) == pytest.approx(1 - 6 * 2 / (4 * 15))


@pytest.mark.parametrize("name", ["matthews", "pearson", "spearman"])
def test_choices_that_are_all_alike_tell_nothing(name: str) -> None:
    assert choice_figure(name, ["1", "1", "1"], ["1", "2", "1"]) == 0
    assert choice_figure(name, ["1", "1"], ["1", "1"]) == 0


def test_words_have_no_correlation() -> None:
    with pytest.raises(ConfigError, match=r"pearson.*no number.*matthews"):
        choice_figure("pearson", ["a"], ["b"])
