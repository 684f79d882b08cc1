"""NIST (Doddington 2002) as mteval-v13a has it, on several references; nltk's takes one reference for each order.

An n-gram tells more the rarer it is among what it could have been: with counts over all references of all inputs,

    info(w₁ … wₙ) = log₂ (count(w₁ … wₙ₋₁) / count(w₁ … wₙ)),   for n = 1 the number of words over the count

    NIST = exp(-β · ln² min(1, L_answers / L_references)) · Σₙ Σ info of the matches / number of n-grams answered

for n = 1 to 5. An n-gram of an answer matches as often as it stands in that reference which has it most often;
L_references is the sum over inputs of their references' mean length; β makes the factor ½ where answers have two thirds
of that length. Words are 13a tokens in lower case.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from deltaw.train.metrics.needed import needed

ORDER = 5
_BETA = math.log(2) / math.log(1.5) ** 2

Grams = Counter[tuple[str, ...]]


def score(name: str, predictions: list[str], references: list[list[str]]) -> tuple[str, float]:
    """The figure under its own name."""
    tokenize = needed("sacrebleu.tokenizers.tokenizer_13a", name).Tokenizer13a()

    def words(text: str) -> list[str]:
        return str(tokenize(text.lower())).split()

    return name, nist([words(text) for text in predictions], [[words(text) for text in texts] for texts in references])


def nist(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> float:
    """NIST of answers with their references, in words: 0 or more, and 0 where nothing is answered."""
    answered = sum(map(len, predictions))
    if not answered:
        return 0.0
    wanted = [[n_grams(words) for words in texts] for texts in references]
    counts: Grams = Counter()
    for texts in wanted:
        for grams in texts:
            counts.update(grams)
    counts[()] = sum(len(words) for texts in references for words in texts)
    found, made = [0.0] * ORDER, [0] * ORDER
    for words, texts in zip(predictions, wanted, strict=True):
        for gram, count in n_grams(words).items():
            made[len(gram) - 1] += count
            if gram in counts:
                matches = min(count, max(grams[gram] for grams in texts))
                found[len(gram) - 1] += matches * math.log2(counts[gram[:-1]] / counts[gram])
    length = sum(sum(map(len, texts)) / len(texts) for texts in references)
    shortness = math.log(min(1.0, answered / length)) if length else 0.0
    return math.exp(-_BETA * shortness**2) * sum(f / m for f, m in zip(found, made, strict=True) if m)


def n_grams(words: Sequence[str]) -> Grams:
    """How often each run of 1 to 5 words occurs."""
    return Counter(tuple(words[i:i + n]) for n in range(1, ORDER + 1) for i in range(len(words) - n + 1))
