"""The plan of a run before it begins: three lines, and a refusal of what cannot fit.

Weights are looked at before they are loaded, by their headers; the rest when the lengths of the examples are known. A
run is refused only if it would not fit by a margin above the plan's worst measured error: a wrong refusal costs more
than a warning. What goes wrong in planning itself never stops a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch

from deltaw.bases import Base
from deltaw.errors import ConfigError, DeltawError, Fault
from deltaw.plan.config import METHODS, Method, PlanConfig
from deltaw.plan.devices import resident_memory
from deltaw.plan.run import MethodPlan, Plan, loading, plan
from deltaw.plan.shapes import is_local
from deltaw.plan.table import lines, size
from deltaw.train.config import TrainConfig
from deltaw.train.examples import Examples

MARGIN = 0.25
"""Share by which a plan has to exceed the memory before a run is refused."""
AHEAD = 20 << 20
"""Bytes that libraries still come to hold between loading and the end of the first step."""
_OF_PLANNING = (DeltawError, RuntimeError, ValueError, AttributeError, TypeError, KeyError, OSError)
"""What planning may fail with on a network that nobody foresaw."""


def check_weights(config: TrainConfig) -> None:
    """Refuse a local base whose weights alone cannot fit, before one of them is loaded."""
    if config.plan != "refuse" or not is_local(config.model):
        return
    asked = PlanConfig(model=config.model, task=config.task, dtype=config.dtype, device=_device(config),
                       methods=("lora" if config.quantize == "none" else "qlora",), quantize=_quantized(config),
                       resident=resident_memory() or None)
    try:
        memory, device = loading(asked)
    except _OF_PLANNING:
        return
    if memory.total * (1 - MARGIN) > device.memory:
        raise ConfigError(Fault(f"base '{config.model}'", f"needs {size(memory.total)} of memory to be loaded, and "
                                f"{size(device.memory)} can be had", "a base that fits",
                                "Take a smaller one or a 16-bit dtype. To try all the same: plan='warn' (--plan warn)"))


def look_ahead(config: TrainConfig, base: Base, examples: Examples) -> list[str]:
    """Three lines on what the run will take; `ConfigError` if it cannot fit, unless `config.plan` is "warn".

    Nothing where `config.plan` is "off", or where this base cannot be planned.
    """
    return _said(config, "this run", lambda: plan_config(config, base, examples))


def look_ahead_together(config: TrainConfig, base: Base, examples: Mapping[str, Examples], *, trained: Sequence[int],
                        tokens: int) -> list[str]:
    """`look_ahead` for a set of jobs: `config` is that of the job with most trained values, `trained` those of each.

    A pass over the base holds `tokens` of any jobs, or one job's batch where that is larger; every job has tensors,
    gradients and moments of its own.
    """
    def asked() -> PlanConfig:
        own = [plan_config(config, base, found) for found in examples.values()]
        widest = max(own, key=lambda each: each.tokens)
        length = max(each.max_length for each in own)
        batch = max(1, math.ceil(max(tokens, widest.tokens) / length))
        return replace(widest, batch_size=batch, max_length=length, adapters=max(1, math.ceil(
            sum(trained) / max(trained))), supervised=max(each.supervised for each in own))

    return _said(config, f"this set of {len(trained)} jobs", asked)


def _said(config: TrainConfig, what: str, asks: Callable[[], PlanConfig]) -> list[str]:
    if config.plan == "off":
        return []
    with torch.random.fork_rng():  # the run draws what it would draw without
        try:
            asked = asks()
            found = plan(asked, search=False)
            method = found.methods[0]
            refused = cannot_fit(found, method) and config.plan == "refuse"
            better = plan(asked).methods[0].change if refused else ""
        except _OF_PLANNING:
            return []  # a plan is a service, and the run itself will say what is wrong with it
    if refused:
        raise ConfigError(Fault(what, f"needs about {size(method.peak)} of memory ({method.binds}), and "
                                f"{size(found.device.memory)} can be had", "one that fits",
                                f"It would with: {better}. To try all the same: plan='warn' (--plan warn)"))
    return lines(found, method.method)


def cannot_fit(found: Plan, method: MethodPlan) -> bool:
    """Whether even a plan that is too high by the margin would not fit."""
    return bool(method.memory) and method.peak * (1 - MARGIN) > found.device.memory


def plan_config(config: TrainConfig, base: Base, examples: Examples) -> PlanConfig:
    """What the run asks of a plan: its longest batches, and the share of their tokens that is learned from."""
    lengths = examples.train.lengths[examples.train_rows]
    batch = min(config.batch_size, len(lengths))
    longest = heaviest(sorted(map(int, lengths), reverse=True), batch, config.batch_tokens)
    stats = examples.train.stats
    classifies = config.task == "seq-cls"
    share = 1.0 if classifies or not stats.tokens else stats.supervised_tokens / stats.tokens
    labels = examples.train.label_names
    return PlanConfig(
        model=str(base.folder or config.model), task=config.task, lora=config.lora,
        num_labels=len(labels) if labels else 2, methods=(planned_as(config),), quantize=_quantized(config),
        batch_size=longest[0], max_length=longest[1], supervised=min(1.0, max(share, 1e-6)),
        grad_accumulation=config.grad_accumulation, packing=config.packing,
        gradient_checkpointing=config.gradient_checkpointing, release_memory=config.release_memory,
        optimizer=config.optimizer,
        dtype=str(base.dtype).removeprefix("torch."), device=_device(config),
        rows=len(lengths), epochs=config.epochs, max_steps=config.max_steps, threads=config.threads,
        max_new_tokens=config.max_new_tokens, bottleneck=config.baseline.bottleneck,
        virtual_tokens=max(1, config.baseline.prefix_tokens + config.baseline.infix_tokens),
        resident=resident_memory() + AHEAD if _device(config) == "cpu" and resident_memory() else None)


def planned_as(config: TrainConfig) -> Method:
    """The plan's name of what is trained; ConfigError for a method that it does not know."""
    if config.method == "lora":
        return "lora" if config.quantize == "none" else "qlora"
    known = next((method for method in METHODS if method == config.method), None)
    if known is None or config.quantize != "none":
        raise ConfigError(Fault("plan", f"knows no {config.method} with quantize {config.quantize}", "another method"))
    return known


def _quantized(config: TrainConfig) -> Literal["nf4", "fp4", "int8"]:
    return "nf4" if config.quantize == "none" else config.quantize


def _device(config: TrainConfig) -> str:
    return "cpu" if config.chosen_device() == "cpu" else "auto"


def heaviest(lengths: Sequence[int], batch: int, budget: int | None) -> tuple[int, int]:
    """Examples and tokens of each, of the heaviest batch: the longest examples together, within the budget."""
    longest = lengths[:batch]
    if budget is not None:
        kept, tokens = 0, 0
        for n in longest:
            tokens += n
            if kept and tokens > budget:
                break
            kept += 1
        longest = longest[:kept]
    return len(longest), max(2, round(sum(longest) / len(longest)))
