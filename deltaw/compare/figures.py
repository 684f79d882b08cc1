"""Which way a figure is good."""

from __future__ import annotations

LOWER_IS_BETTER = ("loss", "perplexity", "ter")


def better(figure: str, one: float, other: float) -> bool:
    """Whether the one value of a figure is better than the other."""
    return one < other if figure in LOWER_IS_BETTER else one > other


def is_measurable(figure: str) -> bool:
    """Whether 90 % of a figure means something: not of a loss."""
    return figure not in LOWER_IS_BETTER
