"""What the figures of a study's page say, in plain words beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from deltaw.compare import StudyResult
from deltaw.compare.figures import LOWER_IS_BETTER, better, scale, shown
from deltaw.compare.noise import Measured, noise_of
from deltaw.compare.table import Row, best_first

_MOST = 6
"""Sentences of one kind; more are a table again."""


def by_rank(result: StudyResult) -> list[str]:
    """For what the arms of each line share: the best rank, and the smallest that is within noise of it."""
    judge = result.judged_by
    rows = {row.arm: row for row in result.rows if judge in row.figures}
    lines: dict[str, dict[int, Measured]] = {}
    for arm, (rest, rank) in result.ranks.items():
        if arm in rows:
            lines.setdefault(rest, {})[rank] = rows[arm].figures[judge]
    found = [value for of in lines.values() for value in of.values()]
    noise = noise_of(found)
    said = []
    for rest, of in lines.items():
        if len(of) < 2:
            continue
        best = next(rank for rank in of if not any(better(judge, other.mean, of[rank].mean) for other in of.values()))
        text = f"{rest + ': ' if rest else ''}r={best} has the best {judge}, {shown(judge, of[best])}"
        if noise is None:
            said.append(f"{text}; with one seed it is not known how much of that is chance.")
            continue
        least = min(rank for rank, value in of.items() if noise.covers(of[best], value))
        said.append(f"{text}, and no smaller rank is within the seeds' noise of it." if least == best else
                    f"{text}; r={least}, {shown(judge, of[least])}, is within the seeds' noise of it.")
    return said[:_MOST]


def by_size(result: StudyResult) -> list[str]:
    """The best arm for each number of examples, and whether the order of the arms depends on it."""
    judge = result.judged_by
    sizes = sorted({row.size for row in result.rows}, key=lambda size: size or math.inf)
    orders = {size: best_first([row for row in result.rows if row.size == size], judge) for size in sizes}
    orders = {size: rows for size, rows in orders.items() if rows}
    said = [f"With {f'{size:,}' if size else 'all'} examples {rows[0].arm} has the best {judge}, "
            f"{shown(judge, rows[0].figures[judge])}." for size, rows in orders.items()]
    everywhere = set.intersection(*({row.arm for row in rows} for rows in orders.values())) if orders else set()
    if len(orders) > 1 and len(everywhere) > 1:
        alike = len({tuple(row.arm for row in rows if row.arm in everywhere) for rows in orders.values()}) == 1
        said.append("The order of the arms by their means "
                    + ("is the same with every number of examples." if alike else "depends on the number of examples."))
    return said[:_MOST]


def latency(rows: Sequence[Row]) -> list[str]:
    """For each batch what share of the base's time a changed forward pass takes, at most, at least, and merged."""
    said = []
    for batch, words in (("1", "One row"), ("16", "16 rows")):
        more = _more(rows, f"tuned_{batch}", f"base_{batch}")
        if not more:
            continue
        least, most = min(more, key=more.__getitem__), max(more, key=more.__getitem__)
        text = f"{words}: {most} takes {_percent(more[most])} the base's time"
        if least != most:
            text += f", the most; {least} {_percent(more[least])} it, the least"
        merged = _more(rows, f"merged_{batch}", f"base_{batch}")
        if merged:
            words = " and ".join(f"{arm} takes {_percent(value)} it" for arm, value in list(merged.items())[:3])
            text += f". Merged, {words}"
        said.append(text + ".")
    return said


def _more(rows: Sequence[Row], name: str, base: str) -> dict[str, float]:
    return {row.arm: row.latency[name] / row.latency[base] for row in rows
            if name in row.latency and row.latency.get(base)}


def _percent(times: float) -> str:
    return f"{100 * times:.0f} % of"


def curves(lines: Mapping[str, Sequence[tuple[int, float]]]) -> list[str]:
    """Which arm ends with the lowest held-out loss, and which rose again after their lowest."""
    ends = {arm: [(step, loss) for step, loss in curve if math.isfinite(loss)] for arm, curve in lines.items()}
    ends = {arm: curve for arm, curve in ends.items() if len(curve) > 1}
    if not ends:
        return []
    said = []
    lowest = min(ends, key=lambda arm: ends[arm][-1][1])
    if len(ends) > 1:
        said.append(f"{lowest} ends lowest, at {ends[lowest][-1][1]:.4g}.")
    for arm, curve in ends.items():
        step, least = min(curve, key=lambda point: point[1])
        if step != curve[-1][0] and curve[-1][1] > least:
            said.append(f"{arm} was lowest after step {step}, at {least:.4g}, and rose to {curve[-1][1]:.4g}.")
    if len(said) == (len(ends) > 1):
        said.append("No arm's loss rose again: each was lowest at its end.")
    return said[:_MOST]


def at_equal_size(result: StudyResult) -> list[str]:
    """Which target set is best where all have the same number of values, and which it cannot be told from."""
    judge = result.judged_by
    ordered = best_first(result.rows, judge)
    if len(ordered) < 2:
        return []
    values = [row.figures[judge] for row in ordered]
    noise = noise_of(values)
    text = f"With at most {result.config['budget']:,} values {ordered[0].arm} has the best {judge}, " \
           f"{shown(judge, values[0])}"
    if noise is None:
        return [f"{text}; with one seed it is not known how much of that is chance."]
    close = [row.arm for row in ordered[1:] if noise.covers(values[0], row.figures[judge])]
    unit = "higher" if judge not in LOWER_IS_BETTER else "lower"
    worst = abs(values[0].mean - values[-1].mean) * scale(judge)
    told = f"within the seeds' noise of it: {', '.join(close)}" if close else "none is within the seeds' noise of it"
    return [f"{text}, {worst:.2g} {unit} than the last; {told}."]
