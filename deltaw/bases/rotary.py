"""Rotary positions of queries and keys in one pass each, where a kernel (`native_rows`) is for them.

    y = x∘cos + rotate_half(x)∘sin

transformers' models compute it in a function that the code of their attention finds among its globals. If it is found
to compute this, attention runs with another in its place for the length of a block, and no other model does: torch's
operations are a dozen passes over queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from types import FunctionType, MethodType
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from deltaw.bases import native_rows
from deltaw.bases.exchanged import exchanged
from deltaw.bases.norms import is_transformed

NAME = "apply_rotary_pos_emb"
Rotary = Callable[..., tuple[Tensor, Tensor]]


@contextmanager
def rotary_in_one_pass(model: nn.Module) -> Iterator[None]:
    """A model in bfloat16 with the kernel for its positions, for the length of the block."""
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    every = _with_the_kernel(model) if first is not None and native_rows.fit(first) else {}
    with exchanged({module: partial(_forward, module.forward, forward) for module, forward in every.items()}):
        yield


def _with_the_kernel(model: nn.Module) -> dict[nn.Module, Callable[..., Any]]:
    """The modules whose code calls such a function, and their forward with the kernel in its place."""
    made: dict[type, FunctionType] = {}
    for kind in {type(module) for module in model.modules()}:
        forward = kind.forward
        if isinstance(forward, FunctionType) and not hasattr(forward, "__wrapped__") \
                and NAME in forward.__code__.co_names and _is_the_formula(own := forward.__globals__.get(NAME)):
            scope = forward.__globals__ | {NAME: wraps(own)(partial(_rotary, own))}
            made[kind] = FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__,
                                      forward.__closure__)
            made[kind].__kwdefaults__ = forward.__kwdefaults__
    return {module: MethodType(made[type(module)], module) for module in model.modules()
            if type(module) in made and "forward" not in module.__dict__}


def _forward(own: Callable[..., Any], forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return (own if torch.compiler.is_compiling() else forward)(*args, **kwargs)


@torch.no_grad()
def _is_the_formula(rotary: Any) -> TypeGuard[Rotary]:
    """Whether a function gives what the formula gives for queries and keys of other numbers of heads."""
    generator = torch.Generator().manual_seed(0)
    q, k, cosine, sine = (torch.randn(shape, generator=generator, device="cpu")
                          for shape in ((2, 3, 5, 8), (2, 1, 5, 8), (2, 5, 8), (2, 5, 8)))
    try:
        found = rotary(q, k, cosine, sine)
        return len(found) == 2 and all(torch.allclose(mine, _plain(x, cosine, sine), atol=1e-5)
                                       for mine, x in zip(found, (q, k), strict=True))
    except (IndexError, RuntimeError, TypeError, ValueError):
        return False  # it is asked in another way


def _plain(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cosine[:, None] + torch.cat([-second, first], -1) * sine[:, None]


def _rotary(own: Rotary, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    if not torch.is_grad_enabled() or len(args) != 4 or kwargs or not _fit(*args):
        return own(*args, **kwargs)
    both: tuple[Tensor, Tensor] = _Rotary.apply(*args)  # type: ignore[no-untyped-call]
    return both


def _fit(*tensors: Any) -> bool:
    """Whether the kernel is for q, k (B, heads, T, D) and cos, sin (B or 1, T, D)."""
    if any(type(t) is not Tensor for t in tensors) or [t.dim() for t in tensors] != [4, 4, 3, 3]:
        return False
    q, k, cosine, sine = tensors
    B, _, T, D = q.shape
    return (D % 2 == 0 and k.shape[::2] == (B, T) and k.shape[-1] == D and q.numel() > 0 and k.numel() > 0
            and all(t.shape[0] in (1, B) and t.shape[1:] == (T, D) and not t.requires_grad for t in (cosine, sine))
            and native_rows.fit(*tensors) and not is_transformed())


class _Rotary(torch.autograd.Function):
    """Queries and keys at their positions, of which cos and sin are kept."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cosine, sine)
        return native_rows.rotated(q, cosine, sine), native_rows.rotated(k, cosine, sine)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor, Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return (native_rows.rotated(dq, cosine, sine, back=True), native_rows.rotated(dk, cosine, sine, back=True),
                None, None)
