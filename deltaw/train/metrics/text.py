"""BLEU, METEOR and ROUGE as their kept implementations compute them.

    bleu      sacrebleu's default (13a tokens, case counts, exponential smoothing), 0 to 100
    meteor    nltk's, mean over the inputs, in lower case; without WordNet's files only exact words and stems match, and
              the figure is called meteor_exact_stem: it is lower than METEOR 1.5, which the papers use
    rouge*    rouge-score's F-measure, the best of the references, mean over the inputs

The E2E challenge's own script differs in details: its BLEU takes no account of case, its ROUGE-L weighs recall higher.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from deltaw.errors import ConfigError, Fault
from deltaw.train.metrics.needed import needed


class _NoSynonyms:
    """Stands in for WordNet where its files are not there: no word has a synonym."""

    def synsets(self, word: str) -> list[Any]:
        """None."""
        return []


def score(name: str, predictions: list[str], references: list[list[str]]) -> tuple[str, float]:
    """The figure and the name to report it under."""
    if name == "bleu":
        return name, bleu(predictions, references)
    if name == "meteor":
        return meteor(predictions, references)
    return name, rouge(name, predictions, references)


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU, 0 to 100. Inputs may have different numbers of references."""
    sacrebleu = needed("sacrebleu", "bleu")
    most = max(map(len, references))
    streams = [[texts[k] if k < len(texts) else None for texts in references] for k in range(most)]
    return float(sacrebleu.corpus_bleu(list(predictions), streams).score)


def meteor(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[str, float]:
    """Mean METEOR over the inputs, 0 to 1, and its name: without WordNet it is another figure."""
    meteor_score = needed("nltk.translate.meteor_score", "meteor").meteor_score
    wordnet = _wordnet()
    scores = [meteor_score([words(text) for text in texts], words(prediction), wordnet=wordnet)
              for prediction, texts in zip(predictions, references, strict=True)]
    label = "meteor_exact_stem" if isinstance(wordnet, _NoSynonyms) else "meteor"
    return label, sum(scores) / len(scores)


def rouge(name: str, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean over the inputs of the best F-measure with one of the references, 0 to 1."""
    scorer = needed("rouge_score.rouge_scorer", name).RougeScorer([name])
    scores = [scorer.score_multi(texts, prediction)[name].fmeasure
              for prediction, texts in zip(predictions, references, strict=True)]
    return float(sum(scores) / len(scores))


def words(text: str) -> list[str]:
    """Penn Treebank tokens in lower case."""
    return list(_tokenizer().tokenize(text.lower()))


def numbers(texts: Sequence[object], figure: str) -> list[float]:
    """Choices as numbers, for a correlation; ConfigError where one is none."""
    try:
        return [float(str(text)) for text in texts]
    except ValueError as error:
        raise ConfigError(Fault("metrics", f"{figure} got an answer that is no number ({error})", "numbers",
                                "Use accuracy, f1 or matthews")) from error


@cache
def _tokenizer() -> Any:
    return needed("nltk.tokenize", "meteor").TreebankWordTokenizer()


def _wordnet() -> Any:
    nltk = needed("nltk", "meteor")
    for place in ("corpora/wordnet", "corpora/wordnet.zip"):
        try:
            nltk.data.find(place)
        except LookupError:
            continue
        return needed("nltk.corpus", "meteor").wordnet
    return _NoSynonyms()
