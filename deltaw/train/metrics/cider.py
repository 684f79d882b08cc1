"""CIDEr-D (Vedantam et al. 2015) as the E2E challenge's script has it: no light library that is kept computes it.

For n = 1 to 4, an n-gram weighs tf·(ln N - ln df) with df the number of inputs, of N, whose references hold it. With
these vectors g of an answer and of a reference,

    CIDEr-D_n = 10 · mean over references of exp(-(l_c - l_r)²/2σ²) · Σ min(g_c, g_r)·g_r / (‖g_c‖·‖g_r‖),   σ = 6

and the figure is the mean over n and over inputs. As in that script the lengths l count bigrams, and tf is a count.
Words are Penn Treebank tokens in lower case without punctuation. One input alone makes every weight zero.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from deltaw.train.metrics.text import words

ORDER, SIGMA = 4, 6.0
PUNCTUATION = {"''", "'", "``", "`", "(", ")", "{", "}", "[", "]", "-lrb-", "-rrb-", "-lcb-", "-rcb-", ".", "?", "!",
               ",", ":", "-", "--", "...", ";", '"'}

Grams = Counter[tuple[str, ...]]


def score(name: str, predictions: list[str], references: list[list[str]]) -> tuple[str, float]:
    """The figure under its own name."""
    return name, cider_d(predictions, references)


def cider_d(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D of answers with their references: 0 to 10."""
    answers = [n_grams(text) for text in predictions]
    wanted = [[n_grams(text) for text in texts] for texts in references]
    found: Grams = Counter(gram for texts in wanted for gram in {gram for grams in texts for gram in grams})
    rarity = {gram: math.log(len(wanted)) - math.log(count) for gram, count in found.items()}
    unseen = math.log(len(wanted))
    scores = [sum(_similarity(answer, grams, rarity, unseen) for grams in texts) / len(texts)
              for answer, texts in zip(answers, wanted, strict=True)]
    return 10.0 * sum(scores) / len(scores)


def n_grams(text: str) -> Grams:
    """How often each run of 1 to 4 words occurs."""
    tokens = [word for word in words(text) if word not in PUNCTUATION]
    return Counter(tuple(tokens[i:i + n]) for n in range(1, ORDER + 1) for i in range(len(tokens) - n + 1))


def _similarity(answer: Grams, reference: Grams, rarity: Mapping[tuple[str, ...], float], unseen: float) -> float:
    """The mean over n of the clipped cosine, lowered where the lengths differ."""
    apart = sum(c for g, c in answer.items() if len(g) == 2) - sum(c for g, c in reference.items() if len(g) == 2)
    inner, squares = [0.0] * ORDER, [[0.0] * ORDER, [0.0] * ORDER]
    for side, grams in zip(squares, (answer, reference), strict=True):
        for gram, count in grams.items():
            side[len(gram) - 1] += (count * rarity.get(gram, unseen)) ** 2
    for gram, count in answer.items():
        if gram in reference:
            weight = rarity[gram]
            inner[len(gram) - 1] += min(count, reference[gram]) * reference[gram] * weight**2
    cosines = [i / math.sqrt(a * b) if a and b else 0.0 for i, a, b in zip(inner, *squares, strict=True)]
    return math.exp(-(apart**2) / (2 * SIGMA**2)) * sum(cosines) / ORDER
