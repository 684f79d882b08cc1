"""Frozen RMSNorms that keep less, and are quick on a processor: x in 16 bits and one number a token, nothing else.

    r = 1 / sqrt(mean(x²) + eps),  y = w·(r x),  dx = r·(w∘g - x·r²·mean(x∘w∘g))

Plain autograd keeps x in float32, twice as much. Which modules are of this kind is not read from names: one forward is
watched, and a module is taken if it gives what the formula gives, also where eps is what counts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltaw.bases import native_rows
from deltaw.bases.exchanged import exchanged

HALVES = (torch.bfloat16, torch.float16)
_NEAR = 2.0**-7
"""Relative distance of two roundings in bfloat16."""
_MOST = 0.02
"""Share of numbers that may be rounded otherwise than by the formula: sums have no agreed order."""


class Form(IntEnum):
    """Where a norm rounds to 16 bits, and what it multiplies by; numbers as in `norm.c`."""

    NORMED_ROUNDED = 0
    """w·round(r x), as LLaMA's"""
    PRODUCT_ROUNDED = 1
    """round(w·(r x)), as torch's own"""
    ONE_MORE = 2
    """round((1 + w)·(r x)), as Gemma's"""


class Norm(NamedTuple):
    """A module that computes the formula, and what it computes it with."""

    module: nn.Module
    name: str
    """Of its weight (D,)."""
    eps: float
    form: Form

    @property
    def weight(self) -> Tensor:
        """As it is now."""
        weight: Tensor = getattr(self.module, self.name)
        return weight


@torch.no_grad()
def norm_modules(model: nn.Module, forward: Callable[[], object]) -> list[Norm]:
    """The frozen RMSNorms of a model in 16 bits, as one forward shows; without values, as their own code shows."""
    norms = {module: found for module in model.modules() if (found := _read(module)) is not None}
    seen: dict[nn.Module, bool] = {}

    def judge(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        right = len(args) == 1 and isinstance(args[0], Tensor) and isinstance(output, Tensor) \
            and _is_of(norms[module], args[0], output)
        seen[module] = right and seen.get(module, True)

    hooks = [module.register_forward_hook(judge) for module in norms]
    try:
        if norms:
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return [norm for module, norm in norms.items() if seen.get(module)]


def _is_of(norm: Norm, x: Tensor, y: Tensor) -> bool:
    """Whether y is what the formula gives for x; of tensors without values, whether it could be."""
    if (x.shape, x.dtype) != (y.shape, y.dtype) or x.dtype != norm.weight.dtype or x.shape[-1:] != norm.weight.shape:
        return False
    return x.is_meta or not x.numel() or _differ(_plain(x, norm.weight, norm.eps, norm.form)[0], y) <= _MOST


def _read(module: nn.Module) -> Norm | None:
    """What a module alone tells: it is probed on numbers of its own, since a network may be without values."""
    parameters = dict(module.named_parameters())
    eps = next((e for name in ("variance_epsilon", "eps") if isinstance(e := getattr(module, name, None), float)), 0.0)
    if len(parameters) != 1 or eps <= 0 or [*module.children(), *module.buffers()] \
            or "forward" in module.__dict__:
        return None
    (name, weight), = parameters.items()
    if weight.dim() != 1 or weight.dtype not in HALVES or not weight.numel():
        return None
    x, w = _probe(weight.numel(), weight.dtype, eps)
    twin = copy.copy(module)
    twin.__dict__.update(_parameters={name: nn.Parameter(w, requires_grad=False)}, training=True)
    try:
        y = twin.forward(x)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return None  # it wants more than one tensor
    if not isinstance(y, Tensor) or (y.shape, y.dtype) != (x.shape, x.dtype):
        return None
    differ, form = min((_differ(_plain(x, w, eps, form)[0], y), form) for form in Form)
    return Norm(module, name, eps, form) if differ <= _MOST else None


def _probe(width: int, dtype: torch.dtype, eps: float) -> tuple[Tensor, Tensor]:
    """x (8, D), half of which is so small that eps counts, and a weight (D,)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, width, generator=generator, device="cpu") + 0.5
    x[4:] *= eps**0.5
    return x.to(dtype), (torch.rand(width, generator=generator, device="cpu") + 0.25).to(dtype)


def _differ(mine: Tensor, theirs: Tensor) -> float:
    """The share of numbers that differ; 1 if one differs by more than a rounding."""
    a, b = mine.float(), theirs.float()
    near = torch.isclose(a, b, rtol=_NEAR, atol=1e-7, equal_nan=True).all()
    return float((a != b).logical_and(~a.isnan()).float().mean()) if near else 1.0


@contextmanager
def keeping_less(norms: Sequence[Norm]) -> Iterator[None]:
    """These modules by the node below, for the length of the block; where it is not for an input, as they are."""
    with exchanged({norm.module: partial(_forward, norm, norm.module.forward) for norm in norms}):
        yield


def _forward(norm: Norm, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or len(args) != 1 or kwargs:
        return forward(*args, **kwargs)  # a compiler makes one pass of it by itself
    x, weight = args[0], norm.weight
    if type(x) is not Tensor or x.dtype not in HALVES or x.dtype != weight.dtype or weight.requires_grad \
            or x.shape[-1:] != weight.shape or not x.numel() or x.stride(-1) != 1 or is_transformed():
        return forward(x)
    y: Tensor = _RMSNorm.apply(x, weight, norm.eps, norm.form)  # type: ignore[no-untyped-call]
    return y


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, which know nothing of nodes such as this."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


class _RMSNorm(torch.autograd.Function):
    """The norm of x (..., D), of which x and r (..., 1) are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, form: Form) -> Tensor:
        y, r = native_rows.norm(x, weight, eps, form) if native_rows.fit(x) else _plain(x, weight, eps, form)
        ctx.save_for_backward(x, weight, r)
        ctx.form = form
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight, r = ctx.saved_tensors
        if native_rows.fit(x, g):
            return native_rows.norm_backward(g, x, weight, r, ctx.form), None, None, None
        wide = x.float()
        wg = g * _scale(weight, ctx.form)
        wide *= r * r * (wide * wg).mean(-1, keepdim=True)
        return wg.sub_(wide).mul_(r).to(x.dtype), None, None, None


def _scale(weight: Tensor, form: Form) -> Tensor:
    return weight.float() + 1 if form == Form.ONE_MORE else weight.float()


def _plain(x: Tensor, weight: Tensor, eps: float, form: Form) -> tuple[Tensor, Tensor]:
    """y and r in plain operations."""
    wide = x.float()
    r = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normed = wide * r
    if form == Form.NORMED_ROUNDED:
        return weight * normed.to(x.dtype), r
    return (normed * _scale(weight, form)).to(x.dtype), r
