"""What fits: the largest rank, batch, length and number of adapters, and the cheapest change where nothing does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from deltaw.plan.config import PlanConfig
from deltaw.plan.forecast import At, Forecast, Setting

_MOST = 1 << 20


def largest(forecast: Forecast) -> dict[str, int]:
    """The largest value of each that fits with the others as asked; 0 where none does."""
    at, limit = forecast.asked, forecast.setting.device.memory
    ways: dict[str, Callable[[int], At]] = {
        "batch_size": lambda n: replace(at, batch=n), "max_length": lambda n: replace(at, length=n)}
    if forecast.method in ("lora", "qlora"):
        ways["rank"] = lambda n: replace(at, rank=n)
    if forecast.method != "full":
        ways["adapters"] = lambda n: replace(at, adapters=n)
    most = {"rank": max((t.site.geometry.max_rank for t in forecast.setting.targets if t.rank), default=1)
            if "rank" in ways else 1}
    return {name: last(lambda n, way=way: forecast.worst(way(n))[1].total <= limit,  # type: ignore[misc]
                       most.get(name, _MOST)) for name, way in ways.items()}


def last(fits: Callable[[int], bool], most: int) -> int:
    """The largest n in 1..most for which this holds, where it holds up to some n only; 0 where for none.

    >>> last(lambda n: n * n <= 50, 1000)
    7
    """
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def cheapest_change(forecast: Forecast) -> str:
    """What to change so that a run fits that does not, the cheapest first; what it would need where nothing helps."""
    if not forecast.setting.device.memory:
        return ""
    least = forecast.worst()[1].total
    for text, changed, at in changes(forecast):
        needed = changed.worst(at)[1].total
        if needed <= changed.setting.device.memory:
            return text
        least = min(least, needed)
    return f"nothing here makes it fit: at the least it needs {least / 1e9:,.1f} GB"


def changes(forecast: Forecast) -> Iterator[tuple[str, Forecast, At]]:
    """Ways to need less, from one that costs nothing to one that changes what is learned; each with where it is."""
    config, setting, at = forecast.setting.config, forecast.setting, forecast.asked
    recomputing = _with(setting, replace(config, gradient_checkpointing="layer"))
    one = replace(at, batch=1)
    if forecast.peak("load").total <= setting.device.memory:
        batch = last(lambda n: forecast.worst(replace(at, batch=n))[1].total <= setting.device.memory,
                     config.batch_size)
        if batch:
            times = -(-config.batch_size // batch)
            yield (f"batch_size {batch} with grad_accumulation {config.grad_accumulation * times}: the same result",
                   forecast, replace(at, batch=batch))
        if config.gradient_checkpointing != "layer":
            again = Forecast(recomputing, forecast.method)
            yield "gradient_checkpointing layer: a step computes a third more", again, at
            yield "batch_size 1 and gradient_checkpointing layer", again, one
    if forecast.method == "lora":
        yield "a base in 4 bits (qlora)", Forecast(setting, "qlora"), at
        yield ("a base in 4 bits (qlora), batch_size 1 and gradient_checkpointing layer",
               Forecast(recomputing, "qlora"), one)
    if forecast.method == "full":
        yield "lora", Forecast(setting, "lora"), at
        yield "a base in 4 bits (qlora)", Forecast(setting, "qlora"), at
    if config.max_length > 128:
        yield "max_length 128: longer examples are cut", forecast, replace(one, length=128)


def _with(setting: Setting, config: PlanConfig) -> Setting:
    changed = Setting(config, setting.shapes, setting.device, setting.dtype, setting.rates)
    changed.steps, changed.quadratic = setting.steps.under(config), setting.quadratic
    for name in ("model", "weights", "largest_tensor", "values", "head", "biases", "linears", "targets"):
        if name in setting.__dict__:  # they do not depend on what is changed here
            changed.__dict__[name] = setting.__dict__[name]
    return changed
