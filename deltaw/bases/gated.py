"""Gated feed-forwards that keep less: act(g)·u is made again in the backward pass instead of being kept.

    y = down(act(gate(x)) · up(x))          g = gate(x), u = up(x)

Plain autograd keeps g, act(g), u and their product for each token, four of the widest values that a transformer has;
g and u are enough. Which modules are of this kind is not read from names: one forward is watched, and a module is taken
if what its parts were given and gave is this formula to the last bit. The numbers stay the same to the last bit too,
but where act is SiLU and a kernel (`native_rows`) makes the product in one pass: there single ones round otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from deltaw.bases import native_rows
from deltaw.bases.exchanged import exchanged


class Gated(NamedTuple):
    """A module that computes the formula, and its parts."""

    module: nn.Module
    gate: nn.Module
    up: nn.Module
    act: nn.Module
    down: nn.Module
    gate_first: bool = True
    """Whether the gate is called before `up`; layers of one input are computed together in their order."""


@torch.no_grad()
def gated_modules(model: nn.Module, forward: Callable[[], object]) -> list[Gated]:
    """The modules of a model that compute the formula, as one forward shows."""
    found: list[Gated] = []
    calls: dict[nn.Module, list[tuple[nn.Module, Tensor, Tensor]]] = {}
    parents = {child: module for module in model.modules() for child in module.children()}
    candidates = {module for module in model.modules() if 4 <= len(list(module.children())) <= 6}

    def note(child: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if len(args) == 1 and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            calls.setdefault(parents[child], []).append((child, args[0], output))

    def judge(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen = calls.pop(module, [])
        gated = _recognised(module, seen, output) if len(args) == 1 and len(seen) == 4 else None
        if gated is not None and seen[0][1] is args[0]:
            found.append(gated)

    hooks = [m.register_forward_hook(judge) for m in candidates]
    hooks += [child.register_forward_hook(note) for child, parent in parents.items() if parent in candidates]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return [one for one in found if sum(one.module is other.module for other in found) == 1]


def _recognised(module: nn.Module, seen: Sequence[tuple[nn.Module, Tensor, Tensor]], output: Any) -> Gated | None:
    """The parts, if these four calls are those of the formula."""
    acts = [call for call in seen if not list(call[0].parameters()) and not list(call[0].buffers())]
    if len(acts) != 1:
        return None
    (act, g, a), (first, second, (down, p, y)) = acts[0], [call for call in seen if call is not acts[0]]
    (gate, x, own), (up, also, u) = (first, second) if first[2] is g else (second, first)
    right = (own is g and x is also and y is output and seen[-1][0] is down and p.shape == u.shape
             and torch.equal(a * u, p) and _is_a_function(act, g, a))
    return Gated(module, gate, up, act, down, gate is first[0]) if right else None


def _is_a_function(act: nn.Module, g: Tensor, a: Tensor) -> bool:
    """Whether act gives a for g under training too: a dropout would draw."""
    was_training = act.training
    with torch.random.fork_rng(devices=[]):
        try:
            return torch.equal(act.train()(g), a)
        finally:
            act.train(was_training)


@torch.no_grad()
def _is_silu(act: nn.Module) -> bool:
    """Whether act gives in bfloat16 what SiLU gives."""
    z = torch.cat([torch.linspace(-120, 120, 481, device="cpu"), torch.logspace(-20, 1, 200, device="cpu")])
    z = torch.cat([z, -z]).bfloat16()
    try:
        return torch.equal(act.forward(z), F.silu(z))
    except (NotImplementedError, RuntimeError):
        return False  # an activation for another device


def _is_watched(act: nn.Module) -> bool:
    return bool(act._forward_hooks or act._forward_pre_hooks or act._backward_hooks or act._backward_pre_hooks)


@contextmanager
def product_made_again(modules: Sequence[Gated]) -> Iterator[None]:
    """These modules without the product among what is kept for the backward pass, for the length of the block."""
    with exchanged({one.module: partial(_forward, one, _is_silu(one.act), one.module.forward) for one in modules}):
        yield


def _forward(parts: Gated, is_silu: bool, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or len(args) != 1 or kwargs:
        return forward(*args, **kwargs)  # a compiler decides itself what to make again
    if parts.gate_first:
        g, u = parts.gate(args[0]), parts.up(args[0])
    else:
        u, g = parts.up(args[0]), parts.gate(args[0])
    quick = is_silu and g.shape == u.shape and g.numel() > 0 and native_rows.fit(g, u) and not _is_watched(parts.act)
    again = _Again(g.detach(), u.detach(), parts.act, quick, [])
    p: Tensor = _Product.apply(g, u, parts.act, quick, again.halves)  # type: ignore[no-untyped-call]
    place, shape, dtype = p.data_ptr(), p.shape, p.dtype

    def pack(kept: Tensor) -> Tensor | _Again:
        return again if (kept.data_ptr(), kept.shape, kept.dtype) == (place, shape, dtype) else kept

    with saved_tensors_hooks(pack, _unpack):
        y: Tensor = parts.down(p)
    return y


class _Again(NamedTuple):
    """What stands for the product where it would be kept."""

    g: Tensor
    u: Tensor
    act: nn.Module
    quick: bool
    """Whether the kernel makes the product, and its gradients."""
    halves: list[tuple[Tensor, Tensor]]
    """g and act(g) with the graph between them, once they were made, for the node of the product to take."""


def _unpack(kept: Tensor | _Again) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    if kept.quick:
        return native_rows.gate(kept.g, kept.u)
    if not kept.halves:
        kept.halves.append(_activated(kept.g, kept.act))
    return kept.halves[0][1].detach() * kept.u


def _activated(g: Tensor, act: nn.Module) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = g.detach().requires_grad_()
        return leaf, act(leaf)


class _Product(torch.autograd.Function):
    """act(g)·u, of which g and u are kept."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor, act: nn.Module, quick: bool,
                halves: list[tuple[Tensor, Tensor]]) -> Tensor:
        ctx.save_for_backward(g, u)
        ctx.act, ctx.quick, ctx.halves = act, quick, halves
        product: Tensor = native_rows.gate(g, u) if quick else act(g) * u
        return product

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        g, u = ctx.saved_tensors
        if ctx.quick:
            return *native_rows.gate_backward(gradient, g, u), None, None, None
        leaf, a = ctx.halves.pop() if ctx.halves else _activated(g, ctx.act)
        dg, = torch.autograd.grad(a, leaf, gradient * u)
        return dg, gradient * a.detach(), None, None, None
