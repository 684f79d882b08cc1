"""Which way a figure is good."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from deltaw.compare.noise import Measured
from deltaw.train.metrics import SHARES


class HasFigures(Protocol):
    """A row of a table."""

    @property
    def figures(self) -> Mapping[str, Measured]:
        """Its figures by name."""


LOWER_IS_BETTER = ("loss", "perplexity", "ter")


_REPORTED_AS: Mapping[str, tuple[str, ...]] = {"meteor": ("meteor_exact_stem",)}
"""Figures that are reported under another name where what they need is not there: METEOR without WordNet."""


_OF_A_HUNDRED = (*SHARES, "meteor", "meteor_exact_stem", "rouge1", "rouge2", "rougeL")
"""Figures from 0 to 1 that tables print, as papers do, times 100."""


def scale(figure: str) -> int:
    """What a figure is multiplied with where a person reads it: 100 for shares, as the papers print them."""
    return 100 if figure in _OF_A_HUNDRED else 1


def heading(figure: str) -> str:
    """A figure's name over a column of what `shown` says."""
    return f"{figure}, %" if scale(figure) == 100 else figure


def shown(figure: str, value: Measured) -> str:
    """A figure over seeds as a person reads it."""
    return str(value.times(scale(figure)))


def reported(figure: str, rows: Iterable[HasFigures]) -> str:
    """The name under which these rows have a figure."""
    names = {name for row in rows for name in row.figures}
    return next((name for name in (figure, *_REPORTED_AS.get(figure, ())) if name in names), figure)


def better(figure: str, one: float, other: float) -> bool:
    """Whether the one value of a figure is better than the other."""
    return one < other if figure in LOWER_IS_BETTER else one > other


def is_measurable(figure: str) -> bool:
    """Whether 90 % of a figure means something: not of a loss."""
    return figure not in LOWER_IS_BETTER
