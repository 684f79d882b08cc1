"""Intrinsic dimension: the smallest random subspace in which training reaches 90 % of full fine-tuning (d₉₀).

    DID     θ = θ₀ + P(θ_d)                          (Li et al. 2018)
    SAID    θ_i = θ₀_i + λ_i P(θ_{d-m})_i, m layers  (Aghajanyan, Zettlemoyer and Gupta 2020, arXiv 2012.13255)

The figure is not strictly monotone in d, since each run has noise: bisection finds one crossing, and the curve shows
every d that was tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from deltaw.compare.arms import RATES, Arm, arms_of_comparison, runs_of
from deltaw.compare.config import CompareConfig
from deltaw.compare.figures import reported
from deltaw.compare.study import Tell, run_study
from deltaw.compare.table import rows_of

SHARE = 0.9
"""Of full fine-tuning's figure that has to be reached."""
SEARCH = "intrinsic"
"""Folder of the search's runs, below the study's."""
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
    """d₉₀ by both measures, with all training data. The figure has to be better higher, such as accuracy.

    Full fine-tuning is the comparison's own arm where it has one, with what was trained for it; the search's runs have
    a folder of their own. Nothing where full fine-tuning has no figure.
    """
    config = replace(config, sizes=())
    own = Path(config.train.out).expanduser()

    def measured(arm: Arm, folder: Path) -> float | None:
        runs = runs_of(config, [arm])
        row = rows_of(runs, run_study(folder, runs, tell))[0]
        found = row.figures.get(reported(config.judged_by, [row]))
        return None if found is None else found.mean

    arm, compared = full_arm(config)
    top = measured(arm, own if compared else own / SEARCH)
    if top is None:
        tell("intrinsic dimension: full fine-tuning has no figure to take 90 % of")
        return []
    found = []
    for measure, aware in (("DID", False), ("SAID", True)):
        def figure(d: int, measure: str = measure, aware: bool = aware) -> float | None:
            options = {"method": "subspace", "learning_rate": RATES["subspace"] * config.rate_factor,
                       "baseline": {"dimension": d, "structure_aware": aware}}
            return measured(Arm(f"{measure} d={d}", options), own / SEARCH)

        d90, curve, note = smallest(figure, SHARE * top, *config.dimensions)
        found.append(Intrinsic(measure=measure, d90=d90, target=SHARE * top, full=top, curve=curve, note=note))
    return found


def full_arm(config: CompareConfig) -> tuple[Arm, bool]:
    """Full fine-tuning, and whether it is one of the comparison's arms: the first of them that is."""
    arms = arms_of_comparison(config)
    arm = next((arm for arm in arms if arm.options.get("method", config.train.method) == "full"), None)
    if arm is not None:
        return arm, True
    return arms_of_comparison(replace(config, methods=("full",), arms={}))[0], False


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
