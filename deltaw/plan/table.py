"""A plan as rows for people."""

from __future__ import annotations

from collections.abc import Sequence

from deltaw.plan.memory import PARTS
from deltaw.plan.run import MethodPlan, Plan

_LARGEST = ("rank", "batch_size", "max_length", "adapters")


def rows(plan: Plan) -> list[list[str]]:
    """The side-by-side table: a row for each figure, a column for each way of tuning."""
    methods = plan.methods
    table = [["trained values", *(f"{m.parameters:,}" for m in methods)],
             ["share of the base", *(f"{m.parameters / plan.parameters:.3%}" for m in methods)]]
    for part in PARTS:
        table.append([f"  {part}", *(_size(m.memory["train"].parts.get(part, 0.0) if m.memory else None)
                                     for m in methods)])
    for phase, title in (("train", "training, peak"), ("evaluate", "evaluation, peak"), ("save", "saving, peak"),
                         ("load", "loading, peak"), ("merge", "merging on disk, peak")):
        table.append([title, *(_size(m.memory[phase].total if phase in m.memory else None)  # type: ignore[index]
                               for m in methods)])
    table += [["adapter's file", *(size(m.adapter_bytes) for m in methods)],
              ["checkpoint", *(size(m.checkpoint_bytes) for m in methods)],
              ["time of a step", *(duration(m.step_seconds) for m in methods)]]
    if any(m.evaluation_seconds is not None for m in methods):
        table.append(["time of an evaluation", *(duration(m.evaluation_seconds) for m in methods)])
    if any(m.total_seconds is not None for m in methods):
        table.append(["time of the run", *(duration(m.total_seconds) for m in methods)])
    table += [["fits", *(_fits(m) for m in methods)], ["most is taken by", *(m.binds or "-" for m in methods)]]
    if any(m.largest for m in methods):
        table += [[f"largest {name}", *(_largest(m, name) for m in methods)] for name in _LARGEST]
    return table


def lines(plan: Plan, method: str = "lora") -> list[str]:
    """Three lines on one way of tuning: what is trained, what it takes, and whether that is there."""
    m = plan[method]
    if not m.parameters:
        return [f"plan: this base has nothing for {method} to train"]
    if not m.memory:
        return [f"plan: {m.parameters:,} trained values; memory is not known, a step of this base cannot be followed"]
    parts = m.memory["train"].parts
    main = ", ".join(f"{name} {size(parts[name])}" for name in sorted(parts, key=lambda n: -parts[n])[:3])
    timed = "" if m.step_seconds is None else f"; a step takes about {duration(m.step_seconds)}"
    read = "" if m.evaluation_seconds is None else f", an evaluation {duration(m.evaluation_seconds)}"
    total = "" if m.total_seconds is None else f", the run {duration(m.total_seconds)}"
    return [f"plan: {m.parameters:,} trained values ({m.parameters / plan.parameters:.3%}), a file of "
            f"{size(m.adapter_bytes)}",
            f"plan: {size(m.peak)} of memory at the peak ({main}){timed}{read}{total}",
            f"plan: {'fits' if m.fits else 'DOES NOT FIT'}, {size(plan.device.memory)} can be had on "
            f"{plan.device.name}"]


def title(plan: Plan) -> str:
    """What the table is about."""
    config = plan.config
    return (f"{config.model}: {plan.parameters:,} parameters, {size(plan.weights)} in {plan.dtype}; "
            f"{config.batch_size} x {config.max_length} tokens; {plan.device.name}, {size(plan.device.memory)}")


def changes(methods: Sequence[MethodPlan]) -> list[str]:
    """For each way that does not fit, what would make it."""
    return [f"{m.method} would fit with {m.change}" if not m.change.startswith("nothing") else f"{m.method}: {m.change}"
            for m in methods if m.change]


def size(count: float) -> str:
    """Bytes in decimal units.

    >>> size(37_748_736), size(350_500_000_000)
    ('37.7 MB', '350.5 GB')
    """
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            value = count / scale
            return f"{value:.3g} {unit}" if value < 1 else f"{value:,.2f} {unit}" if value < 10 else \
                f"{value:,.1f} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours; "-" where it is not known."""
    if seconds is None:
        return "-"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def _size(count: float | None) -> str:
    return "-" if count is None else size(count) if count >= 1 else "0"


def _fits(method: MethodPlan) -> str:
    return "-" if method.fits is None else "yes" if method.fits else "NO"


def _largest(method: MethodPlan, name: str) -> str:
    return f"{method.largest[name]:,}" if name in method.largest else "-"
