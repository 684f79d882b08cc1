"""AdamW over the tensors of a tuning, and the learning rate as a pure function of the step.

    θ ← θ - η(t)·( m̂ / (√v̂ + ε) + λθ )        λ on matrices only (Loshchilov & Hutter 2019)

The schedules are transformers' (`get_scheduler`), so that curves can be compared: step 0 of a warm-up has rate 0. They
have no state; a resumed run needs nothing but its step.

LoRA+ (Hayou et al. 2024) gives every B a rate of its own, a multiple of A's.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deltaw.errors import Fault, MissingDependencyError
from deltaw.train.row_adamw import RowAdamW

_LEAST_NORM = 1e-6
"""What torch adds to a norm that it divides by."""
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
          betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, ratio_of_B: float = 1.0,
          bits: Literal[8, 32] = 32) -> torch.optim.Optimizer:
    """An AdamW that decays tensors of two or more dimensions and leaves biases, norms and scales alone.

    One fused pass over all tensors. With 8 bits the moments of larger tensors are kept so, by bitsandbytes.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        factor = ratio_of_B if name.endswith(".lora_B") else 1.0
        groups.setdefault((weight_decay if parameter.ndim >= 2 else 0.0, factor), []).append(parameter)
    listed: list[dict[str, Any]] = [
        {"params": members, "weight_decay": decay, "rate_factor": factor, "lr": learning_rate * factor}
        for (decay, factor), members in groups.items()]
    if bits == 8:
        made: torch.optim.Optimizer = _bitsandbytes().optim.AdamW8bit(listed, lr=learning_rate, betas=betas, eps=eps)
        return made
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters.values())
    kind = RowAdamW if fused else torch.optim.AdamW
    return kind(listed, lr=learning_rate, betas=betas, eps=eps, fused=fused)


def _bitsandbytes() -> Any:
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise MissingDependencyError(Fault("TrainConfig.optimizer", "got 'adamw8bit', and bitsandbytes is not "
                                           "installed", "the package", "pip install 'deltaw[quant]'")) from error


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group this learning rate, times its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate_factor", 1.0)


def take_step(optimizer: torch.optim.Optimizer, rate: float, *, norm: Tensor, longest: float) -> None:
    """One step at this rate with gradients that are `norm` long, cut to `longest` (0: never); they are then gone.

    A fused AdamW cuts them as it reads them, which spares a pass over all gradients.
    """
    cut = 0.0 < longest < float(norm) + _LEAST_NORM  # a shorter gradient would be multiplied by 1
    fused = isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["fused"]
    set_rate(optimizer, rate)
    if cut and fused:  # an attribute by which torch's gradient scaler has gradients divided
        optimizer.grad_scale = (norm.float() + _LEAST_NORM) / longest  # type: ignore[attr-defined]
    elif cut:
        members = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        torch.nn.utils.clip_grads_with_norm_(members, longest, norm)
    try:
        optimizer.step()
    finally:
        if cut and fused:
            del optimizer.grad_scale  # type: ignore[attr-defined]
    optimizer.zero_grad(set_to_none=True)


def warmup_of(total: int, *, ratio: float, steps: int | None) -> int:
    """Warm-up steps of a run: `steps` when given, else the ratio of `total`, rounded up as transformers does."""
    return steps if steps is not None else math.ceil(total * ratio)
