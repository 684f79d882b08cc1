"""Intrinsic dimension: the smallest random subspace in which training reaches 90 % of full fine-tuning (d₉₀).

    DID     θ = θ₀ + P(θ_d)                          (Li et al. 2018)
    SAID    θ_i = θ₀_i + λ_i P(θ_{d-m})_i, m layers  (Aghajanyan, Zettlemoyer and Gupta 2020, arXiv 2012.13255)

The figure is not strictly monotone in d, since each run has noise: bisection finds one crossing, and the curve shows
every d that was tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deltaw.compare.arms import RATES, Arm, runs_of
from deltaw.compare.config import CompareConfig
from deltaw.compare.study import Tell, run_study
from deltaw.compare.table import Row, rows_of

SHARE = 0.9
"""Of full fine-tuning's figure that has to be reached."""
CLOSE = 1.25
"""The search ends when its bounds are this factor apart."""


@dataclass(frozen=True, kw_only=True)
class Intrinsic:
    """What one of the two measures found."""

    measure: str
    """DID or SAID."""
    d90: int | None
    """The smallest dimension tried that reaches the target; None where none did."""
    target: float
    """90 % of full fine-tuning's figure."""
    full: float
    """Full fine-tuning's figure."""
    curve: tuple[tuple[int, float], ...]
    """Dimension and figure of every run, by dimension."""
    note: str = ""
    """What keeps the search from an answer, if anything does."""


def intrinsic_dimension(config: CompareConfig, tell: Tell) -> list[Intrinsic]:
    """d₉₀ by both measures. The figure has to be one that is better higher, such as accuracy."""
    folder = Path(config.train.out).expanduser()

    def measured(arm: Arm) -> Row:
        runs = runs_of(config, [arm])
        return rows_of(runs, run_study(folder, runs, tell))[0]

    full = measured(Arm("full", {"method": "full", "learning_rate": RATES["full"] * config.rate_factor}))
    if config.judged_by not in full.figures:
        return []
    top = full.figures[config.judged_by].mean
    found = []
    for measure, aware in (("DID", False), ("SAID", True)):
        def figure(d: int, measure: str = measure, aware: bool = aware) -> float | None:
            options = {"method": "subspace", "learning_rate": RATES["subspace"] * config.rate_factor,
                       "baseline": {"dimension": d, "structure_aware": aware}}
            row = measured(Arm(f"{measure} d={d}", options))
            return row.figures[config.judged_by].mean if config.judged_by in row.figures else None

        d90, curve, note = smallest(figure, SHARE * top, *config.dimensions)
        found.append(Intrinsic(measure=measure, d90=d90, target=SHARE * top, full=top, curve=curve, note=note))
    return found


def smallest(figure: Callable[[int], float | None], target: float, low: int, high: int
             ) -> tuple[int | None, tuple[tuple[int, float], ...], str]:
    """The smallest d within low..high whose figure reaches the target, by bisection of log d; all points; a remark."""
    seen: dict[int, float] = {}

    def reaches(d: int) -> bool:
        value = figure(d)
        if value is not None:
            seen[d] = value
        return value is not None and value >= target

    def points() -> tuple[tuple[int, float], ...]:
        return tuple(sorted(seen.items()))

    if not reaches(high):
        return None, points(), f"{high:,} dimensions do not reach the target"
    if reaches(low):
        return low, points(), f"already {low:,} dimensions reach it; the answer is at most that"
    while high / low > CLOSE:
        middle = round(math.sqrt(low * high))
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return high, points(), ""
