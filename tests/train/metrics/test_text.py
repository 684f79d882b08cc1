"""Figures of written texts against the libraries' own entry points, and CIDEr-D against a second implementation."""

from __future__ import annotations

import csv
import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from deltaw.errors import MissingDependencyError
from deltaw.train.metrics import METRICS, SETS, TEXT_METRICS, expand, needed, text_figure
from deltaw.train.metrics.cider import PUNCTUATION, cider_d
from deltaw.train.metrics.text import words


@pytest.fixture(scope="module")
def e2e() -> tuple[list[str], list[list[str]]]:
    """For 40 inputs of the E2E test set: the last reference as the answer, the others as references."""
    file = Path(__file__).parents[4] / "shared" / "data" / "e2e_nlg" / "testset_w_refs.csv"
    if not file.is_file():
        pytest.skip("the E2E data are not in ../shared/data")
    groups: dict[str, list[str]] = {}
    with file.open(encoding="utf-8", newline="") as opened:
        for row in csv.DictReader(opened):
            groups.setdefault(row["mr"], []).append(row["ref"])
    chosen = [texts for texts in groups.values() if len(texts) > 2][:40]
    return [texts[-1] for texts in chosen], [texts[:-1] for texts in chosen]


def test_bleu_is_what_sacrebleus_own_command_prints(e2e: tuple[list[str], list[list[str]]], tmp_path: Path) -> None:
    predictions, references = e2e
    most = max(map(len, references))
    (tmp_path / "out").write_text("\n".join(predictions) + "\n", encoding="utf-8")
    for k in range(most):  # the command takes files of equal length: inputs with fewer references repeat one
        (tmp_path / f"ref{k}").write_text("\n".join(texts[k % len(texts)] for texts in references) + "\n",
                                          encoding="utf-8")
    command = [sys.executable, "-m", "sacrebleu", *(f"ref{k}" for k in range(most)), "-i", "out", "-b", "-w", "6"]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert text_figure("bleu", predictions, references)[1] == pytest.approx(float(printed), abs=1e-6)


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_rouge_scores_best_reference(e2e: tuple[list[str], list[list[str]]], name: str) -> None:
    from rouge_score import rouge_scorer

    predictions, references = e2e
    scorer = rouge_scorer.RougeScorer([name])
    best = [max(scorer.score(reference, prediction)[name].fmeasure for reference in texts)
            for prediction, texts in zip(predictions, references, strict=True)]
    assert text_figure(name, predictions, references) == (name, pytest.approx(sum(best) / len(best)))


# --------------------------------------------------------------------------------------------------------- CIDEr-D


def second_cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D from the paper's equations, one order at a time, with vectors over all n-grams."""
    def grams(text: str, n: int) -> Counter[str]:
        tokens = [word for word in words(text) if word not in PUNCTUATION]
        return Counter(" ".join(tokens[i:i + n]) for i in range(len(tokens) - n + 1))

    total = 0.0
    for n in range(1, 5):
        per_input = []
        wanted = [[grams(text, n) for text in texts] for texts in references]
        for prediction, texts, sides in zip(predictions, references, wanted, strict=True):
            values = []
            for text, side in zip(texts, sides, strict=True):
                answer = grams(prediction, n)
                vocabulary = sorted(set(answer) | set(side))
                idf = [math.log(len(references) / max(1, sum(any(g in s for s in other) for other in wanted)))
                       for g in vocabulary]
                c = [answer[g] * w for g, w in zip(vocabulary, idf, strict=True)]
                r = [side[g] * w for g, w in zip(vocabulary, idf, strict=True)]
                norms = math.sqrt(sum(x * x for x in c)) * math.sqrt(sum(x * x for x in r))
                inner = sum(min(x, y) * y for x, y in zip(c, r, strict=True))
                apart = sum(grams(prediction, 2).values()) - sum(grams(text, 2).values())
                values.append(inner / norms * math.exp(-apart**2 / 72) if norms else 0.0)
            per_input.append(10 * sum(values) / len(values))
        total += sum(per_input) / len(per_input)
    return total / 4


def test_cider_is_what_a_second_implementation_gives(e2e: tuple[list[str], list[list[str]]]) -> None:
    predictions, references = e2e[0][:8], e2e[1][:8]
    assert cider_d(predictions, references) == pytest.approx(second_cider(predictions, references), rel=1e-9)


def test_cider_of_the_references_themselves_is_ten() -> None:
    texts = ["the red fox jumps high", "a small boat sails away today", "no one came to the party"]
    assert cider_d(texts, [[text] for text in texts]) == pytest.approx(10)
    assert cider_d(["nothing alike", "at all", "here"], [[text] for text in texts]) == 0
    assert cider_d([texts[0] + " again and again and again", *texts[1:]], [[text] for text in texts]) < 10


def test_cider_does_not_count_case_and_punctuation() -> None:
    texts = ["The red fox jumps high.", "A small boat sails away, today!", "Nobody came to the party"]
    plain = [re.sub(r"[.,!]", "", text).lower() for text in texts]
    assert cider_d(plain, [[text] for text in texts]) == pytest.approx(10)


# ------------------------------------------------------------------------------------------------------------ names


def test_sets_stand_for_figures_that_exist() -> None:
    assert {one for names in SETS.values() for one in names} <= set(METRICS)
    assert expand(("bleu", "rouge", "rouge1")) == ("bleu", "rouge1", "rouge2", "rougeL")
    assert set(TEXT_METRICS) < set(METRICS)


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(MissingDependencyError, match=r"bleu.*pip install 'deltaw\[metrics\]'"):
        text_figure("bleu", ["a"], [["a"]])
    assert needed.needed("math", "x") is math
