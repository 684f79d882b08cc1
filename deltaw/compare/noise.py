"""Mean, spread and when a difference is more than the seeds' own; for figures of few seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

UNSTEADY = 4.0
"""How many times the median arm's spread an arm's may be; of three seeds chance alone exceeds it once in 60,000."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A figure over seeds."""

    mean: float
    sd: float | None
    """Standard deviation between seeds (n - 1); None of one seed."""
    n: int

    def times(self, factor: float) -> Measured:
        """The same in another unit."""
        return Measured(self.mean * factor, None if self.sd is None else self.sd * factor, self.n)

    def __str__(self) -> str:
        return f"{self.mean:.4g}" if self.sd is None else f"{self.mean:.4g} ± {self.sd:.2g}"


def measured(values: Sequence[float]) -> Measured:
    """Mean and spread of at least one value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Measured(mean, None, len(values))
    return Measured(mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)), len(values))


def pooled(groups: Sequence[Measured]) -> float | None:
    """The spread between seeds that all arms share: √(Σ(n-1)sd² / Σ(n-1)); None where no arm has two seeds.

    Of three seeds one arm's own spread is known to within a factor of two at best; ten arms' together is not so bad.
    """
    freedom = sum(group.n - 1 for group in groups if group.sd is not None)
    if freedom == 0:
        return None
    return math.sqrt(sum((group.n - 1) * group.sd ** 2 for group in groups if group.sd is not None) / freedom)


@dataclass(frozen=True, slots=True)
class Noise:
    """What two arms may differ by although their seeds are all that differs."""

    sd: float
    """The spread between seeds that the steady arms share."""
    freedom: int
    """Its degrees of freedom."""
    widest: float = math.inf
    """The largest spread of a steady arm."""

    def is_steady(self, arm: Measured) -> bool:
        """Whether its seeds lie no further apart than the others' do."""
        return arm.sd is None or arm.sd <= self.widest

    def margin(self, one: Measured, other: Measured) -> float:
        """The difference of two means that chance exceeds one time in twenty: t(0.975, f)·√(v₁/n₁ + v₂/n₂).

        v is the shared variance, and f its freedom; an unsteady arm has its own, and then f is Welch's (1947).
        """
        (v1, f1), (v2, f2) = self._variance(one), self._variance(other)
        part1, part2 = v1 / one.n, v2 / other.n
        if self.is_steady(one) and self.is_steady(other):
            freedom = self.freedom
        else:
            freedom = int((part1 + part2) ** 2 / (part1 ** 2 / f1 + part2 ** 2 / f2))
        return student_t(freedom) * math.sqrt(part1 + part2)

    def covers(self, one: Measured, other: Measured) -> bool:
        """Whether the difference of two means is no more than chance makes of it one time in twenty."""
        return abs(one.mean - other.mean) <= self.margin(one, other)

    def _variance(self, arm: Measured) -> tuple[float, int]:
        return (self.sd ** 2, self.freedom) if arm.sd is None or self.is_steady(arm) else (arm.sd ** 2, arm.n - 1)


def noise_of(groups: Sequence[Measured]) -> Noise | None:
    """The noise of a study's arms; None where no arm has two seeds.

    An arm that collapses with one seed in three has a spread of another kind, which would hide every difference between
    the others: arms whose spread is over `UNSTEADY` times the median of all are left out, where there are three arms.
    """
    spreads = [group.sd for group in groups if group.sd is not None]
    widest = UNSTEADY * median(spreads) if len(spreads) > 2 else 0.0
    steady = [group for group in groups if group.sd is not None and (not widest or group.sd <= widest)]
    sd = pooled(steady)
    return None if sd is None else Noise(sd, sum(group.n - 1 for group in steady), widest or math.inf)


def student_t(freedom: int) -> float:
    """The 97.5 % point of Student's t, from the normal's by Cornish and Fisher's expansion (1937), exact at 1 and 2.

    Within 1 % of the tables from 3 degrees of freedom on.
    """
    if freedom <= 2:
        return (12.706, 4.303)[max(freedom, 1) - 1]
    z, v = 1.959964, float(freedom)
    return (z + (z ** 3 + z) / (4 * v) + (5 * z ** 5 + 16 * z ** 3 + 3 * z) / (96 * v ** 2)
            + (3 * z ** 7 + 19 * z ** 5 + 17 * z ** 3 - 15 * z) / (384 * v ** 3))
