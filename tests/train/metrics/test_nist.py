"""NIST against sums by hand, and against nltk's function where the two definitions meet: one reference."""

from __future__ import annotations

import csv
import math
import random
from pathlib import Path

import pytest

from deltaw.train.metrics import text_figure
from deltaw.train.metrics.nist import nist


def of(predictions: list[str], references: list[list[str]]) -> float:
    return nist([text.split() for text in predictions], [[text.split() for text in texts] for texts in references])


def test_it_is_the_sum_by_hand() -> None:
    """Of the 8 words of the references a is 4, b is 2, c and d are 1 each: 1, 2, 3 and 3 bits.

    Of pairs, ab is 2 of the 4 that begin with a, aa is 1 of them, bc and bd are each 1 of 2; so are abc and abd.
    The answers hold a, b, c, d and a again (c from one reference and d from the other), ab, bc and not cd, abc and not
    bcd, not abcd. They are as long as the references, 3 and 2 words, in the mean.
    """
    expected = (1 + 2 + 3 + 3 + 1) / 5 + (1 + 1) / 3 + 1 / 2 + 0 / 1
    assert of(["a b c d", "a"], [["a b c", "a b d"], ["a a"]]) == pytest.approx(expected)


def test_matches_are_clipped_by_the_reference_that_has_most() -> None:
    # a is 3 of 5 words and matches 2 of 3 times; aa is 1 of the 3 pairs that begin with a, and matches 1 of 2 times.
    assert of(["a a a"], [["a x", "a a y"]]) == pytest.approx(2 * math.log2(5 / 3) / 3 + math.log2(3) / 2)


@pytest.mark.parametrize("references", [["a b c"], ["a b", "a b c d"]], ids=["one", "their mean"])
def test_two_thirds_of_the_length_is_half_the_figure(references: list[str]) -> None:
    assert of(["a b"], [references]) == pytest.approx(0.5 * math.log2(3))


def test_nothing_answered_and_nothing_matched_are_zero() -> None:
    assert of(["", ""], [["a b"], ["c d"]]) == 0
    assert of(["x y"], [["a b"]]) == 0
    assert of(["x"], [[""]]) == 0
    assert of(["a b", "c"], [["a b"], ["c d"]]) > 0


@pytest.fixture(scope="module")
def e2e() -> tuple[list[str], list[list[str]]]:
    """For 589 inputs of the E2E test set: the last reference as the answer, the others as references."""
    file = Path(__file__).parents[4] / "shared" / "data" / "e2e_nlg" / "testset_w_refs.csv"
    if not file.is_file():
        pytest.skip("the E2E data are not in ../shared/data")
    groups: dict[str, list[str]] = {}
    with file.open(encoding="utf-8", newline="") as opened:
        for row in csv.DictReader(opened):
            groups.setdefault(row["mr"], []).append(row["ref"])
    chosen = [texts for texts in groups.values() if len(texts) > 2]
    return [texts[-1] for texts in chosen], [texts[:-1] for texts in chosen]


def test_with_one_reference_it_is_nltks(e2e: tuple[list[str], list[list[str]]]) -> None:
    from nltk.translate.nist_score import corpus_nist
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    predictions, references = e2e[0][:100], [texts[:1] for texts in e2e[1][:100]]
    split = [[Tokenizer13a()(text.lower()).split() for text in texts] for texts in references]
    expected = corpus_nist(split, [Tokenizer13a()(text.lower()).split() for text in predictions], n=5)
    assert text_figure("nist", predictions, references) == ("nist", pytest.approx(expected))


def test_several_references_count_as_in_the_challenge(e2e: tuple[list[str], list[list[str]]]) -> None:
    """The expected value was computed apart from this code, from mteval-v13a's definition; nltk's gives 7.60."""
    predictions, references = e2e
    assert text_figure("nist", predictions, references)[1] == pytest.approx(8.70, abs=0.005)


def test_the_order_of_references_does_not_count_and_more_of_them_match_more(
        e2e: tuple[list[str], list[list[str]]]) -> None:
    predictions, references = e2e[0][:40], e2e[1][:40]
    figure = text_figure("nist", predictions, references)[1]
    shuffled = [random.Random(0).sample(texts, len(texts)) for texts in references]
    assert text_figure("nist", predictions, shuffled)[1] == pytest.approx(figure)
    assert text_figure("nist", predictions, [texts[:3] for texts in references])[1] < figure
