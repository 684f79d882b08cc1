"""What fits: the largest rank, batch, length and number of adapters, and the cheapest change where nothing does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from deltaw.plan.config import Method, PlanConfig
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
    most = {"max_length": forecast.setting.network.positions or _MOST,
            "rank": max((place.most for place in forecast.setting.places if place.rank), default=1)
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
    again, last_resort = Forecast(recomputing, forecast.method), "batch_size 1 and gradient_checkpointing layer"
    if forecast.peak("load").total <= setting.device.memory:
        yield from _smaller_batches(forecast, "")
        if config.gradient_checkpointing != "layer":
            yield "gradient_checkpointing layer: a step computes a third more", again, at
            yield from _smaller_batches(again, " and gradient_checkpointing layer")
    others: tuple[Method, ...] = ("qlora",) if forecast.method == "lora" else ("lora", "qlora")
    for method in others if forecast.method != "qlora" and setting.packed is None else ():
        name = {"lora": "lora", "qlora": "a base in 4 bits (qlora)"}[method]
        yield name, Forecast(setting, method), at
        yield f"{name}, {last_resort}", Forecast(recomputing, method), replace(at, batch=1)
    if config.max_length > 128:
        yield "batch_size 1 and max_length 128: longer examples are cut", forecast, replace(at, batch=1, length=128)


def _smaller_batches(forecast: Forecast, beside: str) -> Iterator[tuple[str, Forecast, At]]:
    """The largest batch that fits, and as many more passes in each step."""
    config, at, limit = forecast.setting.config, forecast.asked, forecast.setting.device.memory
    batch = last(lambda n: forecast.worst(replace(at, batch=n))[1].total <= limit, config.batch_size)
    if batch:
        passes = config.grad_accumulation * -(-config.batch_size // batch)
        same = ": the same result" if not beside else ""
        yield (f"batch_size {batch} with grad_accumulation {passes}{beside}{same}", forecast,
               replace(at, batch=batch))


def _with(setting: Setting, config: PlanConfig) -> Setting:
    changed = Setting(config, setting.shapes, setting.device, setting.dtype, setting.rates)
    changed.walks, changed.quadratic = setting.walks.under(config), setting.quadratic
    return changed
