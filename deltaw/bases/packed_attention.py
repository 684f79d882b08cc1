"""Attention over examples that lie end to end in one row, none of which sees another.

A batch of examples of mixed lengths has no padding when it is laid out as one row of T tokens. Linear layers and norms
look at one token at a time and do not mind; positions start anew at each example; attention is the one place where the
examples have to be kept apart, here by running it over each by itself. transformers hands `cu_seq_lens_q`, the places
where examples begin, from the model's forward down to its attention function, and lets us name that function. Without
such places it is transformers' own.

The loop over examples is one opaque operation on a CPU, so that a compiled layer has no break in the middle. Neighbours
of one length, which lie evenly in the row, are one call of torch's kernel there: a call for each of many short ones is
mostly overhead.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.bases.any_length import attention_of_any_length

NAME = "deltaw"
PLACES = "cu_seq_lens_q"
"""The name under which a model passes on where examples begin: int32, (examples + 1,), from 0 to T, on the CPU."""


def takes_packed(model: Any) -> bool:
    """Whether this model of transformers can be asked at all: it lets attention be chosen and passes arguments on."""
    parameters = inspect.signature(type(model).forward).parameters
    return ("position_ids" in parameters and any(p.kind is p.VAR_KEYWORD for p in parameters.values())
            and getattr(model, "_supports_sdpa", False) and hasattr(model, "set_attn_implementation")
            and model.config._attn_implementation == "sdpa")


@contextmanager
def packed_attention(model: Any) -> Iterator[None]:
    """The model with attention that understands packed rows, for the length of the block."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def attention_modules() -> Iterator[list[torch.nn.Module]]:
    """The modules whose attention runs inside the block, under `packed_attention`, each once."""
    _seen.append([])
    try:
        yield _seen[-1]
    finally:
        _seen.pop()


_seen: list[list[torch.nn.Module]] = []


def attend(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
           dropout: float = 0.0, scaling: float | None = None, **kwargs: Any) -> tuple[Tensor, None]:
    """Attention of queries (B, heads, T, D) over keys and values (B, KV heads, T, D), as (B, T, heads, D)."""
    if not torch.compiler.is_compiling() and _seen and module not in _seen[-1]:
        _seen[-1].append(module)
    places = kwargs.pop(PLACES, None)
    if places is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        out: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout,
                                                          scaling=scaling, **kwargs)
        return out
    window = kwargs.get("sliding_window")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if query.device.type in ("cpu", "meta") and not dropout and not window and query.shape[-1] == value.shape[-1]:
        return torch.ops.deltaw.packed_attention(query, key, value, places, scale)[0], None
    return _each(query, key, value, places, dropout, scale, window), None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _each(query: Tensor, key: Tensor, value: Tensor, places: Tensor, dropout: float, scale: float,
          window: int | None) -> Tensor:
    """Example by example, in differentiable operations for any device."""
    lengths = [b - a for a, b in pairwise(places.tolist())]
    parts = []
    with attention_of_any_length(query.device):
        for q, k, v, n in zip(*(torch.split(t, lengths, 2) for t in (query, key, value)), lengths, strict=True):
            mask = None if not window or n <= window else _band(n, window, q.device)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None,
                                                 scale=scale, enable_gqa=q.shape[1] != k.shape[1])
            parts.append(out.transpose(1, 2))
    return torch.cat(parts, 1)


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """Which of the tokens before it a token sees: the last `window`, itself included."""
    at = torch.arange(length, device=device)
    back = at[:, None] - at[None, :]
    return (back >= 0) & (back < window)


def _of_one_length(places: Tensor) -> Iterator[tuple[slice, int]]:
    """Parts of the row whose examples all have one length, and that length."""
    for length, spans in groupby(pairwise(places.tolist()), lambda span: span[1] - span[0]):
        edges = [edge for span in spans for edge in span]
        yield slice(edges[0], edges[-1]), length


def _side_by_side(t: Tensor, part: slice, length: int) -> Tensor:
    """A part of t (1, heads, T, ...) as (examples, heads, length, ...); a view."""
    if part.stop - part.start == length:
        return t[:, :, part]
    return t[0, :, part].view(t.shape[1], -1, length, *t.shape[3:]).transpose(0, 1)


@torch.library.custom_op("deltaw::packed_attention", mutates_args=())
def _packed(query: Tensor, key: Tensor, value: Tensor, places: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output (1, T, heads, D) and log-sum-exp (1, T, heads)."""
    _, heads, tokens, width = query.shape
    out = query.new_empty(tokens, heads, width)
    lse = torch.empty(tokens, heads, dtype=torch.promote_types(query.dtype, torch.float32))
    for part, length in _of_one_length(places):
        o, s = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(_side_by_side(t, part, length) for t in (query, key, value)), 0.0, True, scale=scale)
        out[part], lse[part] = o.transpose(1, 2).flatten(0, 1), s.transpose(1, 2).flatten(0, 1)
    return out[None], lse[None]


@_packed.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, places: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    _, heads, tokens, width = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(1, tokens, heads, width), query.new_empty(1, tokens, heads, dtype=wide)


@torch.library.custom_op("deltaw::packed_attention_backward", mutates_args=())
def _packed_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
                     places: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, each laid out tokens first."""
    dq, dk, dv = (torch.empty_like(t.transpose(1, 2), memory_format=torch.contiguous_format)
                  for t in (query, key, value))
    whole = (grad.transpose(1, 2), query, key, value, out.transpose(1, 2), lse.transpose(1, 2))
    for part, length in _of_one_length(places):
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(_side_by_side(t, part, length) for t in whole), 0.0, True, scale=scale)
        for target, gradient in zip((dq, dk, dv), grads, strict=True):
            target[0, part] = gradient.transpose(1, 2).flatten(0, 1)
    return dq, dk, dv


@_packed_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, places: Tensor,
      scale: float) -> tuple[Tensor, Tensor, Tensor]:
    made = [torch.empty_like(t.transpose(1, 2), memory_format=torch.contiguous_format) for t in (query, key, value)]
    return made[0], made[1], made[2]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, places, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, places, *output)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, places, out, lse = ctx.saved_tensors
    grads = _packed_backward(grad.contiguous(), query, key, value, out, lse, places, ctx.scale)
    return (*(g.transpose(1, 2) for g in grads), None, None)


_packed.register_autograd(_differentiate, setup_context=_remember)
