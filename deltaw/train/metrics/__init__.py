"""Figures for answers: what was written, or chosen, beside what was expected; through kept libraries.

    of texts      bleu (sacrebleu), meteor (nltk), rouge1, rouge2, rougeL (rouge-score), nist (as mteval-v13a), cider
                  (CIDEr-D), logical_form (SQL); several references for an input are several rows with the same prompt
    of queries    execution (SQL, here): each row names its database or its table
    of choices    accuracy, f1 (macro), matthews (scikit-learn), pearson, spearman (scipy; the choices are numbers)
    of the loss   perplexity, exp of it

These are plain functions of texts and numbers. They stand within `train` because its evaluation and what is above it
(`compare`, the verbs) are all that uses them; nothing here knows a model. The libraries, the extra `metrics`, are
imported when a figure is computed, and this file imports none of them: the command line reads the names from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

TEXT_METRICS = {"bleu": "text", "nist": "nist", "meteor": "text", "rouge1": "text", "rouge2": "text", "rougeL": "text",
                "cider": "cider", "logical_form": "sql"}
"""Figures of written answers with any number of references, and the file that computes each."""
CHOICE_METRICS = ("accuracy", "f1", "matthews", "pearson", "spearman")
"""Figures of one choice for each row."""
EXECUTION = "execution"
"""The figure of written queries that needs what they are asked of, row by row."""
METRICS = ("exact_match", *CHOICE_METRICS, *TEXT_METRICS, EXECUTION)
"""Every figure where higher is better."""
PERPLEXITY = "perplexity"
SETS = {"rouge": ("rouge1", "rouge2", "rougeL"), "e2e": ("bleu", "nist", "meteor", "rougeL", "cider")}
"""Names for several figures at once; e2e are those of the LoRA paper's Table 3."""
SHARES = ("exact_match", "accuracy", "f1", "logical_form", EXECUTION)
"""Figures that are shares, shown in per cent."""


def expand(names: Sequence[Any]) -> tuple[Any, ...]:
    """The names with each set replaced by its figures, each once."""
    listed = [one for name in names for one in (SETS.get(name, (name,)) if isinstance(name, str) else (name,))]
    return tuple(dict.fromkeys(listed))


def text_figure(name: str, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[str, float]:
    """A figure of written answers, each with its references; with the name to report it under.

    The name differs where the figure is another one than asked for: METEOR without WordNet is `meteor_exact_stem`.
    Raises MissingDependencyError where its library is not installed.
    """
    module = import_module(f"deltaw.train.metrics.{TEXT_METRICS[name]}")
    label, score = module.score(name, list(predictions), [list(texts) for texts in references])
    return str(label), float(score)
