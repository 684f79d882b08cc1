"""The plan of a run before it begins: three lines, and a refusal of what cannot fit.

Weights are looked at before they are loaded, by their headers; the rest when the lengths of the examples are known. A
run is refused only if it would not fit by a margin above the plan's worst measured error: a wrong refusal costs more
than a warning. What goes wrong in planning itself never stops a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from deltaw.bases import Base
from deltaw.bases.quantize import Quantization
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
                       methods=("lora" if config.quantize == "none" else "qlora",),
                       quantize="nf4" if config.quantize == "none" else config.quantize,
                       quantize_tables=config.quantize_tables,
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
    gradients and moments of its own. A step is a round of the set: a job takes one step in it at most.
    """
    def asked() -> PlanConfig:
        own = [plan_config(found.config, base, found) for found in examples.values()]
        length = max(each.max_length for each in own)
        batch = max(1, math.ceil(max(tokens, *(each.tokens for each in own)) / length))
        steps = [each.steps or 1 for each in own]
        read = sum(n * each.grad_accumulation * (each.mean_tokens or each.tokens)
                   for n, each in zip(steps, own, strict=True))
        rounds = max(math.ceil(read / max(tokens, 1)), *steps)
        held_out = sum(each.evaluations * (each.eval_rows or 0) / each.batch_size * (each.mean_tokens or each.tokens)
                       for each in own)
        often = max(each.evaluations for each in own)
        alike = sum(trained) / max(trained)  # adapters of the largest one's size, as many as take the set's memory
        return replace(
            own[0], lora=config.lora, optimizer=config.optimizer, batch_size=batch, max_length=length,
            adapters=max(1, math.ceil(alike)), supervised=max(each.supervised for each in own), grad_accumulation=1,
            max_steps=rounds, mean_tokens=read / rounds, updates=alike * sum(steps) / len(steps) / rounds,
            eval_rows=max(1, round(held_out / often / (read / rounds) * batch)), evaluations=often,
            max_new_tokens=max(each.max_new_tokens for each in own), freeze_a=all(each.freeze_a for each in own),
            release_memory=all(each.release_memory for each in own))

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
        way = f"{better[0].upper()}{better[1:]}" if better.startswith("nothing") else f"It would with: {better}"
        raise ConfigError(Fault(what, f"needs about {size(method.peak)} of memory ({method.binds}), and "
                                f"{size(found.device.memory)} can be had", "one that fits",
                                f"{way}. To try all the same: plan='warn' (--plan warn)"))
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
    passes, held = examples.batches_per_epoch, Quantization.read(base.quantized)
    mean, steps = min(mean_tokens(config, lengths, passes), math.prod(longest)), optimizer_steps(config, passes)
    held_out = padded_tokens(np.sort(examples.valid.lengths[examples.valid_rows]), config.batch_size)
    return PlanConfig(
        model=str(base.folder or config.model), task=config.task, lora=config.lora,
        num_labels=len(labels) if labels else 2, methods=(planned_as(config, held),),
        quantize="nf4" if held is None else held.format, double_quant=held is None or held.double_quant,
        quantize_tables="none" if held is None else held.tables,
        batch_size=longest[0], max_length=longest[1], supervised=min(1.0, max(share, 1e-6)),
        grad_accumulation=config.grad_accumulation, packing=config.packing,
        gradient_checkpointing=config.gradient_checkpointing, release_memory=config.release_memory,
        optimizer=config.optimizer, freeze_a=config.freeze_a,
        dtype=str(base.dtype).removeprefix("torch."), device=_device(config),
        max_steps=steps, threads=config.threads, mean_tokens=mean,
        eval_rows=max(1, round(held_out / mean * longest[0])), evaluations=evaluations(config, steps),
        max_new_tokens=config.max_new_tokens, bottleneck=config.baseline.bottleneck,
        virtual_tokens=max(1, config.baseline.prefix_tokens + config.baseline.infix_tokens),
        resident=_resident(base, held) if _device(config) == "cpu" else None)


def _resident(base: Base, held: Quantization | None) -> int | None:
    """Bytes of this process beside its base: one that was packed is in memory already, another is a mapped file."""
    now, packed = resident_memory(), 0 if held is None else base.model.get_memory_footprint()
    return max(now - packed, 0) + AHEAD if now else None


def mean_tokens(config: TrainConfig, lengths: NDArray[np.int64], passes: int) -> float:
    """Tokens of a micro-batch on average: of `passes` over examples of these lengths, with the padding there is."""
    if config.task == "causal-lm" and config.packing == "auto":
        return float(lengths.sum()) / passes
    batch = math.ceil(len(lengths) / passes)
    listed = np.sort(lengths) if config.group_by_length else lengths
    return padded_tokens(listed, batch) / math.ceil(len(listed) / batch)


def padded_tokens(lengths: NDArray[np.int64], batch: int) -> float:
    """Tokens of examples of these lengths with the padding that there is, so many to a batch as they come."""
    starts = np.arange(0, len(lengths), batch)
    rows = np.diff(starts, append=len(lengths))
    return float((rows * np.maximum.reduceat(lengths, starts)).sum())


def evaluations(config: TrainConfig, steps: int) -> int:
    """How often a run of so many steps evaluates: before, on its way, and after."""
    every = evaluation_pace(config, steps)
    return 2 + (steps // every if every else 0)


def evaluation_pace(config: TrainConfig, steps: int) -> int:
    """Steps between evaluations; 0 for none on the way."""
    return math.ceil(steps / 5) if config.eval_every is None else config.eval_every


def optimizer_steps(config: TrainConfig, batches_per_epoch: int) -> int:
    """Steps of a run of this many micro-batches in a pass over its data."""
    return config.max_steps or max(1, math.ceil(config.epochs * batches_per_epoch / config.grad_accumulation))


def planned_as(config: TrainConfig, held: Quantization | None) -> Method:
    """The plan's name of what is trained on a base that is held so; ConfigError for a method that it does not know."""
    if config.method == "lora":
        return "lora" if held is None else "qlora"
    known = next((method for method in METHODS if method == config.method), None)
    if known is None or held is not None:
        raise ConfigError(Fault("plan", f"knows no {config.method} with quantize {held or 'none'}", "another method"))
    return known


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
