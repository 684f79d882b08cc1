"""Attention over examples that lie end to end in one row, none of which sees another.

A batch of examples of mixed lengths has no padding when it is laid out as one row of T tokens. Linear layers and norms
look at one token at a time and do not mind; positions start anew at each example; attention is the one place where the
examples have to be kept apart, here by running it over each by itself. transformers hands `cu_seq_lens_q`, the places
where examples begin, from the model's forward down to its attention function, and lets us name that function. Without
such places it is transformers' own.

The loop over examples is one opaque operation on a CPU, so that a compiled layer has no break in the middle. Several
examples are one call of torch's kernel there, or of our own where they are quicker (`native_attention`, and without a
compiler `blocked_attention`), which then serve rows without places and padding as well.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.bases import blocked_attention, native_attention
from deltaw.bases.any_length import attention_of_any_length
from deltaw.bases.packed_rows import Padded, evenly, together

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
        blocked_attention.release()


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
    places, scale = kwargs.pop(PLACES, None), query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if places is None:
        if _is_plainly_causal(module, query, key, value, attention_mask, dropout, kwargs):
            return torch.ops.deltaw.packed_attention(query, key, value, None, scale)[0], None
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        out: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout,
                                                          scaling=scaling, **kwargs)
        return out
    window = kwargs.get("sliding_window")
    if query.device.type in ("cpu", "meta") and not dropout and not window and query.shape[-1] == value.shape[-1]:
        return torch.ops.deltaw.packed_attention(query, key, value, places, scale)[0], None
    return _each(query, key, value, places, dropout, scale, window), None


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention of rows that are causal throughout (B, heads, T, D), as (B, T, heads, D), by what is quickest here."""
    if _is_ours(query, key, value):
        own: Tensor = torch.ops.deltaw.packed_attention(query, key, value, None, scale)[0]
        return own
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale,
                                          enable_gqa=query.shape[1] != key.shape[1]).transpose(1, 2)


def _is_ours(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether a kernel of ours is quicker than torch's, for rows without places too."""
    return native_attention.fits(query, key, value) or blocked_attention.is_quicker(query)


def _is_plainly_causal(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
                       dropout: float, others: dict[str, Any]) -> bool:
    """Whether rows without places are causal throughout, and quicker with a kernel of ours."""
    causal = others.get("is_causal")
    return (_is_ours(query, key, value) and mask is None and not dropout and others.get("position_bias") is None
            and others.get("cache") is None and others.get("softcap") is None
            and bool(getattr(module, "is_causal", True) if causal is None else causal)
            and query.shape[2] == key.shape[2] and query.shape[-1] == value.shape[-1])


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


@torch.library.custom_op("deltaw::packed_attention", mutates_args=())
def _packed(query: Tensor, key: Tensor, value: Tensor, places: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Output (B, T, heads, D) and log-sum-exp (B, T, heads), which `blocked_attention` leaves at zero.

    With places B is 1 and they tell examples apart; without, each row is an example.
    """
    out, lse = _made(query)
    inputs = (query, key, value)
    if native_attention.fits(*inputs):
        native_attention.forward(scale, *inputs, places, out.transpose(1, 2), lse.transpose(1, 2))
        return out, lse
    if not blocked_attention.is_quicker(query):
        assert places is not None  # of rows without places, `attend` sends here only what blocks are for
        for same in evenly(places):
            out[0, same.part], lse[0, same.part] = (
                t.transpose(1, 2).flatten(0, 1) for t in _flash(scale, *(same.taken(t) for t in inputs)))
        return out, lse
    y = out.transpose(1, 2)
    if places is None:
        _causal(scale, *inputs, y, lse.transpose(1, 2))
        return out, lse
    for one in together(places, blocked_attention.LONGEST):
        if isinstance(one, Padded):
            copies = [one.taken(t) for t in inputs]
            part = torch.empty_like(copies[0])
            blocked_attention.forward(scale, copies[0], copies[1], copies[2], part)
            one.put(out[0], part)
        else:
            _causal(scale, *(one.taken(t) for t in (*inputs, y, lse.transpose(1, 2))))
    return out, lse


@_packed.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, places: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return _made(query)


def _made(query: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, width = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(batch, tokens, heads, width), query.new_zeros(batch, tokens, heads, dtype=wide)


def _flash(scale: float, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """torch's kernel: y as q, and its log-sum-exp."""
    y, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
    return y, lse


def _causal(scale: float, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor) -> None:
    """Write y, in blocks; of long examples with torch's kernel, and lse."""
    if q.shape[2] <= blocked_attention.LONGEST:
        blocked_attention.forward(scale, q, k, v, y)
    else:
        y[:], lse[:] = _flash(scale, q, k, v)


@torch.library.custom_op("deltaw::packed_attention_backward", mutates_args=())
def _packed_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
                     places: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, each laid out tokens first."""
    made = _made_backward(query, key, value)
    targets = [t.transpose(1, 2) for t in made]
    whole = (grad.transpose(1, 2), query, key, value, out.transpose(1, 2), lse.transpose(1, 2))
    if native_attention.fits(query, key, value):
        native_attention.backward(scale, *whole, places, *targets)
        return made
    if places is None:
        _causal_backward(whole, scale, targets)
        return made
    for one in together(places, blocked_attention.LONGEST) if blocked_attention.is_quicker(query) else evenly(places):
        if isinstance(one, Padded):
            copies = [one.taken(t) for t in whole[1:4]]
            parts = [torch.empty_like(t) for t in copies]
            blocked_attention.backward(scale, one.cleared(whole[0]), *copies, *parts)
            for target, part in zip(made, parts, strict=True):
                one.put(target[0], part)
        else:
            _causal_backward([one.taken(t) for t in whole], scale, [one.taken(t) for t in targets])
    return made


@_packed_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, places: Tensor | None,
      scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return _made_backward(query, key, value)


def _made_backward(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(t.transpose(1, 2), memory_format=torch.contiguous_format) for t in inputs)
    return dq, dk, dv


def _causal_backward(whole: Sequence[Tensor], scale: float, targets: Sequence[Tensor]) -> None:
    """Write dq, dk and dv from g, q, k, v, y and lse, as `_causal` wrote y."""
    query = whole[1]
    if blocked_attention.is_quicker(query) and query.shape[2] <= blocked_attention.LONGEST:
        blocked_attention.backward(scale, *whole[:4], *targets)
        return
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*whole, 0.0, True, scale=scale)
    for target, gradient in zip(targets, gradients, strict=True):
        target[:] = gradient


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, places, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, places, *output)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, places, out, lse = ctx.saved_tensors
    grads = _packed_backward(grad.contiguous(), query, key, value, out, lse, places, ctx.scale)
    return (*(g.transpose(1, 2) for g in grads), None, None)


_packed.register_autograd(_differentiate, setup_context=_remember)
