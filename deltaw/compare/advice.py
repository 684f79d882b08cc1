"""Which arm to take, with the evidence: the smallest that is not surely worse than the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deltaw.compare.figures import scale, shown
from deltaw.compare.noise import noise_of
from deltaw.compare.table import Row, best_first


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A recommendation, and what it rests on."""

    arm: str
    """The arm to take."""
    best: str
    """The arm with the best mean."""
    figure: str
    """What they were judged by."""
    within_noise: tuple[str, ...]
    """Arms whose difference from the best chance alone exceeds more than one time in twenty."""
    noise: float | None
    """Spread between seeds, pooled over the steady arms; None of one seed."""
    text: str
    """The recommendation in words."""


def advise(rows: Sequence[Row], figure: str) -> Advice | None:
    """The smallest arm within noise of the best; None where no arm was finished.

    Noise is the spread between seeds, pooled over the arms that are steady (`noise_of`). With one seed there is none to
    be known, and the best mean is named with that warning.
    """
    ordered = best_first(rows, figure)
    if not ordered:
        return None
    best = ordered[0]
    top = best.figures[figure]
    groups = [row.figures[figure] for row in ordered]
    if len(ordered) == 1:
        return Advice(arm=best.arm, best=best.arm, figure=figure, within_noise=(best.arm,), noise=top.sd,
                      text=f"{best.arm} has {figure} {shown(figure, top)}; no other arm has one to compare it with.")
    noise = noise_of(groups)
    if noise is None:
        text = (f"{best.arm} has the best {figure}, {shown(figure, top)}. With one seed it is not known how much of "
                "the differences is chance: compare with --seeds 0,1,2.")
        return Advice(arm=best.arm, best=best.arm, figure=figure, within_noise=(), noise=None, text=text)
    if len(groups) > 1 and noise.sd == 0.0 and all(group.mean == top.mean for group in groups):
        text = (f"Every arm has the same {figure}, {scale(figure) * top.mean:.4g}, with every seed: judge by a figure "
                "that tells them apart.")
        return Advice(arm=best.arm, best=best.arm, figure=figure, within_noise=tuple(row.arm for row in ordered),
                      noise=noise.sd, text=text)
    close = [row for row in ordered if noise.covers(top, row.figures[figure])]
    wild = [row for row in ordered[1:] if not noise.is_steady(row.figures[figure])]
    chosen = min((row for row in close if row not in wild), key=lambda row: row.parameters)
    return Advice(arm=chosen.arm, best=best.arm, figure=figure, within_noise=tuple(row.arm for row in close),
                  noise=noise.sd, text=_words(chosen, best, figure, noise.sd,
                                              noise.margin(top, chosen.figures[figure])) + _warning(wild, figure))


def _warning(wild: Sequence[Row], figure: str) -> str:
    told = ", ".join(f"{row.arm} ({row.figures[figure].times(scale(figure))})" for row in wild)
    return f" Not to be relied on, since it depends on the seed: {told}." if wild else ""


def _words(chosen: Row, best: Row, figure: str, noise: float, allowed: float) -> str:
    mine, top = (row.figures[figure].times(scale(figure)) for row in (chosen, best))
    noise, allowed = noise * scale(figure), allowed * scale(figure)
    if chosen is best:
        return (f"Take {best.arm}: {figure} {top}, the best, and no smaller arm is within the seeds' noise of it "
                f"(± {noise:.2g}).")
    cost = f"{chosen.parameters:,} trained values, {best.parameters / chosen.parameters:.3g} times fewer" \
        if chosen.parameters else "nothing trained but the head"
    return (f"Take {chosen.arm}: {figure} {mine} is within noise of {best.arm}'s {top} (difference "
            f"{abs(mine.mean - top.mean):.2g}; chance alone exceeds {allowed:.2g} one time in twenty), with "
            f"{cost}.")
