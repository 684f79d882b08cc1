"""Weights that a module uses in ways of its own: stacked experts, any 2-D or 3-D parameter, `nn.MultiheadAttention`,
convolutions that pad their input themselves.

There is no input x to multiply by A, so the host runs with W₀ + s·BA in the place of its weight for the length of one
forward. The base's parameter is not touched: the sum is a new tensor, and gradients flow through it to A and B.
A batch whose rows use different adapters is run in parts.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.layers.adapted import Adapted, parameter_owner, replace_parameter
from deltaw.core.state import Route
from deltaw.errors import Fault, RoutingError


class AdaptedParameters(Adapted):
    """A host run with changed parameters. Inputs and outputs have their rows first, possibly flattened with tokens."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The host's own forward, over changed weights."""
        route = self.state.route
        if route is None:
            with self.substituted(self.state.mix):
                return self.inner(*args, **kwargs)
        if route.is_uniform:
            with self.substituted(dict.fromkeys(route.unique, 1.0)):
                return self.inner(*args, **kwargs)
        return self.run_by_row(route, args, kwargs)

    @contextmanager
    def substituted(self, mix: Mapping[str, float]) -> Iterator[None]:
        """The host with W₀ + Σ w·ΔW in the place of each changed parameter."""
        before: list[tuple[str, Tensor]] = []
        try:
            for parameter, slots in self.changes(mix):
                owner, leaf = parameter_owner(self.host, parameter)
                base = owner.get_parameter(leaf)
                changed = sum((slot.delta(base) * weight for slot, weight in slots), start=base.to(torch.float32)
                              if base.dtype != torch.float64 else base)
                before.append((parameter, replace_parameter(self.host, parameter, changed.to(base.dtype))))
            yield
        finally:
            for parameter, tensor in reversed(before):
                replace_parameter(self.host, parameter, tensor)

    def run_by_row(self, route: Route, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Each adapter's rows through the host, put back in their places."""
        first = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim()), torch.empty(0))
        self.check_rows(first)
        size = first.shape[0]
        parts = []
        for name, rows in route.rows(size, self.site, self._device()).items():
            some, named = select_rows(args, kwargs, rows, size)
            with self.state.only(name), self.substituted({} if name is None else {name: 1.0}):
                parts.append((rows, self.inner(*some, **named)))
        return join_rows(parts, 0)

    def _device(self) -> torch.device:
        return next(self.host.parameters()).device


class AdaptedAttention(AdaptedParameters):
    """`nn.MultiheadAttention`: its projections are parameters, and its batch may be the second dimension."""

    def run_by_row(self, route: Route, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Each adapter's rows of query, key and value, with their masks."""
        host = self.host
        assert isinstance(host, nn.MultiheadAttention)
        bound = inspect.signature(nn.MultiheadAttention.forward).bind(host, *args, **kwargs).arguments
        bound.pop("self")
        dim = 0 if host.batch_first else 1
        query = bound["query"]
        if query.dim() != 3:
            raise RoutingError(Fault(f"routing at site '{self.site}'", f"a query of shape {tuple(query.shape)}",
                                     "a batch of three dimensions", "Add a batch dimension"))
        parts = []
        for name, rows in route.rows(query.shape[dim], self.site, query.device).items():
            with self.state.only(name), self.substituted({} if name is None else {name: 1.0}):
                parts.append((rows, self.inner(**_attention_rows(bound, rows, dim, host.num_heads))))
        outputs = join_rows([(rows, out[0]) for rows, out in parts], dim)
        weights = [(rows, out[1]) for rows, out in parts]
        return outputs, None if weights[0][1] is None else join_rows(weights, 0)


def _attention_rows(bound: Mapping[str, Any], rows: Tensor, dim: int, heads: int) -> dict[str, Any]:
    chosen = dict(bound)
    for name in ("query", "key", "value"):
        chosen[name] = bound[name].index_select(dim, rows)
    if bound.get("key_padding_mask") is not None:
        chosen["key_padding_mask"] = bound["key_padding_mask"].index_select(0, rows)
    mask = bound.get("attn_mask")
    if mask is not None and mask.dim() == 3:  # (B·heads, L, S)
        chosen["attn_mask"] = mask.unflatten(0, (-1, heads)).index_select(0, rows).flatten(0, 1)
    return chosen


def select_rows(args: tuple[Any, ...], kwargs: Mapping[str, Any], rows: Tensor,
                size: int) -> tuple[list[Any], dict[str, Any]]:
    """Arguments for some rows of a batch: tensors whose first dimension has `size` entries are cut, others kept."""
    def select(value: Any) -> Any:
        is_rows = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == size
        return value.index_select(0, rows.to(value.device)) if is_rows else value

    return [select(v) for v in args], {k: select(v) for k, v in kwargs.items()}


def join_rows(parts: list[tuple[Tensor, Any]], dim: int) -> Any:
    """Outputs of parts in the order of the batch; tuples are joined item by item."""
    first = parts[0][1]
    if isinstance(first, tuple):
        return tuple(join_rows([(rows, output[i]) for rows, output in parts], dim) for i in range(len(first)))
    if not isinstance(first, Tensor):
        return first
    order = torch.argsort(torch.cat([rows for rows, _ in parts]))
    return torch.cat([output for _, output in parts], dim).index_select(dim, order.to(first.device))
