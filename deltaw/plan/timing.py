"""The time of a step: what it computes, divided by how fast that goes.

    seconds = Σ (products / rate(shape) + operands / bandwidth) + attention / rate + Σ max(bytes / bandwidth, start)
              + unpacking

with rates of their own for what kernels in C do, where this machine has them.

The work is what a `Tape` heard, with the output layer and the optimizer added. Rates are measured ones on this machine,
and shares of a data sheet's on another, which makes an estimate and no promise.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from deltaw.plan.config import PlanConfig
from deltaw.plan.devices import BANDWIDTH_SHARE, COMPUTE_SHARE, Device
from deltaw.plan.found import Work
from deltaw.plan.memory import Sizes, state_bytes
from deltaw.plan.memory import stretch as stretch_at_once

if TYPE_CHECKING:
    from deltaw.plan.calibrate import Rates

_PASSES_OF_LOSS = 8
"""Times that a stretch's logits are read or written by the loss and its gradient."""
_PASSES_OF_ADAMW = 3
"""Parameter and gradient read, parameter written."""
_PASSES_OF_MOMENTS = 2
"""Each read and written."""
_AROUND = 2.5
"""What an operation takes with the Python around it in a network, in starts of one in a chain."""
FAULTS = 1.15
"""Under gradient checkpointing large tensors are new memory each time (`deltaw.train.memory.release_at_once`)."""
TRIMMED = 1.09
"""With `release_memory` the pages of a step are new ones in the next (`deltaw.train.memory.give_back`)."""
_BF16 = 2
"""Bytes of a number in the kernels' format."""
_GPU_START = 5e-6


def step_work(body: Work, sizes: Sizes, config: PlanConfig, batch: int, length: int, *, kernels: bool = False) -> Work:
    """A whole forward and backward pass: the network's body, the output layer and the loss."""
    if config.task != "causal-lm":
        return body
    return body + _of_output_layer(sizes, config, batch, length, back=2 if sizes.trained_head else 1,
                                   passes=_PASSES_OF_LOSS, kernels=kernels and not sizes.trained_head)


def evaluation_work(body: Work, sizes: Sizes, config: PlanConfig, batch: int, length: int, *,
                    kernels: bool = False) -> Work:
    """A forward pass of an evaluation, which asks for the loss alone; kernels multiply with the output layer only."""
    body = replace(body, drawn=0.0)  # there is no dropout
    if config.task != "causal-lm":
        return body
    return body + _of_output_layer(sizes, config, batch, length, back=0, passes=_PASSES_OF_LOSS // 2, kernels=kernels)


def _of_output_layer(sizes: Sizes, config: PlanConfig, batch: int, length: int, *, back: int, passes: int,
                     kernels: bool) -> Work:
    """The logits of all stretches and the loss of them, with so many products on the way back."""
    rows = config.supervised_tokens(batch, length)
    stretch, _ = stretch_at_once(sizes, config, batch, length)
    head = Work(moved=float(passes * 4 * stretch * sizes.vocabulary), calls=10.0)
    own = head.frozen if kernels else head.products
    own[1, stretch, sizes.vocabulary, sizes.width] = 1
    if back:
        own[1, stretch, sizes.width, sizes.vocabulary] = back
    return Work().plus(head, rows / stretch)


def seconds_here(work: Work, rates: Rates, item: int = 4) -> float:
    """On this machine, by the rates that were measured, of values that take `item` bytes."""
    stream, start = between(rates.bytes, max(rates.bytes)), _AROUND * rates.start
    total = work.attention / rates.attention + (work.drawn / rates.drawn if rates.drawn else 0.0)
    for (batch, rows, outputs, inner), times in work.products.items():
        flops = 2.0 * batch * rows * outputs * inner
        if batch > 1 and rates.batched:
            total += times * (flops / rates.batched + start)
            continue
        operands = float(item * batch * (rows * inner + inner * outputs + rows * outputs))
        narrow = between(rates.narrow_inner, inner) if inner < min(rows, outputs) else \
            between(rates.narrow_output, min(rows, outputs))
        total += times * (flops / narrow + operands / stream + start)
    others = max(1.0, work.calls - sum(work.products.values()))
    size = work.moved / others / 3 / item
    total += max(work.moved / between(rates.bytes, max(1, int(size))), others * start)
    return total + _seconds_of_kernels(work, rates, stream)


def _seconds_of_kernels(work: Work, rates: Rates, stream: float) -> float:
    """What kernels in C take, beside the start of their calls."""
    total = work.passes / rates.passes if work.passes else 0.0
    for (_, rows, outputs, inner), times in work.frozen.items():
        operands = _BF16 * float(rows * inner + inner * outputs + rows * outputs)
        total += times * (2.0 * rows * outputs * inner / between(rates.frozen, rows) + operands / stream)
    for shape, times in work.narrow.items():  # their operands are in the cache
        total += times * 2.0 * math.prod(shape) / between(rates.narrow, min(shape[1:]))
    return total


def seconds_elsewhere(work: Work, device: Device, dtype: str) -> float:
    """On a named device, by its data sheet: an estimate."""
    assert device.tflops is not None
    rate = device.tflops.get(dtype, device.tflops["fp32"]) * 1e12 * COMPUTE_SHARE
    bandwidth = device.bandwidth * 1e9 * BANDWIDTH_SHARE
    return max(work.flops / rate + work.moved / bandwidth, work.calls * _GPU_START)


def unpacking_seconds(sizes: Sizes, packed: float, config: PlanConfig, item: int, device: Device,
                      rates: Rates | None, *, times: int | None = None) -> float:
    """Unpacking `packed` bytes so many times; by default in the forward, in the backward, and where layers are computed
    again once more.
    """
    times = times or (3 if config.gradient_checkpointing == "layer" else 2)
    # The embedding unpacks single rows; the loss unpacks the output layer once for all tokens of a stretch.
    words = sizes.vocabulary * sizes.width if sizes.tables and config.task == "causal-lm" else 0
    tokens = config.supervised_tokens(config.batch_size, config.max_length)
    passes = math.ceil(tokens / stretch_at_once(sizes, config, config.batch_size, config.max_length)[0])
    values = times * sizes.matrices + passes * words
    if rates is not None:
        return values / rates.unpack if rates.unpack else 0.0
    return (values * item + times * packed + passes * words) / (device.bandwidth * 1e9 * BANDWIDTH_SHARE)


def optimizer_seconds(sizes: Sizes, config: PlanConfig, device: Device, rates: Rates | None, *,
                      tensors: int = 1) -> float:
    """An AdamW step of one adapter, whose values lie in so many tensors: one of 8 bits is begun anew for each."""
    if rates is not None and rates.adamw8bit and config.optimizer == "adamw8bit":
        return sizes.trained / between(rates.adamw8bit, max(1, sizes.trained // max(1, tensors)))
    moved = float(_PASSES_OF_ADAMW * sizes.trained * sizes.trained_width)
    moved += _PASSES_OF_MOMENTS * state_bytes(sizes, config)
    if rates is not None:
        return moved / between(rates.bytes, 1 << 23)
    return moved / (device.bandwidth * 1e9 * BANDWIDTH_SHARE)


def between(table: Mapping[int, float], size: int) -> float:
    """A rate for this size: on the line between the measured neighbours, both axes logarithmic."""
    sizes = sorted(table)
    if size <= sizes[0] or size >= sizes[-1]:
        return table[sizes[0] if size <= sizes[0] else sizes[-1]]
    at = bisect.bisect_right(sizes, size)
    low, high = sizes[at - 1], sizes[at]
    share = math.log(size / low) / math.log(high / low)
    return float(table[low] ** (1 - share) * table[high] ** share)
