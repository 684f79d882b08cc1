"""AdamW over the tensors of a tuning, and the learning rate as a pure function of the step.

    θ ← θ - η(t)·( m̂ / (√v̂ + ε) + λθ )        λ on matrices only (Loshchilov & Hutter 2019)

The schedules are transformers' (`get_scheduler`), so that curves can be compared: step 0 of a warm-up has rate 0. They
have no state; a resumed run needs nothing but its step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import nn

Schedule = Callable[[int], float]
"""From a step, counted from 0, to the factor of the peak learning rate."""


def schedule(kind: Literal["linear", "cosine", "constant"], *, total: int, warmup: int) -> Schedule:
    """The factor of the learning rate at each of `total` steps, the first `warmup` of which rise from 0.

    >>> rate = schedule("linear", total=10, warmup=2)
    >>> [rate(step) for step in (0, 1, 2, 6)]
    [0.0, 0.5, 1.0, 0.5]
    """

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        done = (step - warmup) / max(1, total - warmup)
        match kind:
            case "constant":
                return 1.0
            case "linear":
                return max(0.0, 1.0 - done)
            case "cosine":
                return max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))

    return factor


def adamw(parameters: Mapping[str, nn.Parameter], *, learning_rate: float, weight_decay: float = 0.0,
          betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> torch.optim.AdamW:
    """An AdamW that decays tensors of two or more dimensions and leaves biases, norms and scales alone."""
    decayed = [p for p in parameters.values() if p.ndim >= 2]
    spared = [p for p in parameters.values() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=learning_rate, betas=betas, eps=eps)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def warmup_of(total: int, *, ratio: float, steps: int | None) -> int:
    """Warm-up steps of a run: `steps` when given, else the ratio of `total`, rounded up as transformers does."""
    return steps if steps is not None else math.ceil(total * ratio)
