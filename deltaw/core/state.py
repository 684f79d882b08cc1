"""What is switched on: the one small object that all adapted layers of a model read in their forward.

Only the switchboard writes it. Because every layer holds a reference to the same object, switching adapters is one
assignment, whatever the size of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import torch

from deltaw.core.packed import Workspace
from deltaw.errors import Fault, RoutingError


class Segment(NamedTuple):
    """Consecutive tokens of a batch that use one adapter; `None` is the base."""

    name: str | None
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Route:
    """Which adapter each row of a batch uses; `None` is the base."""

    names: tuple[str | None, ...]
    lengths: tuple[int, ...] | None = None
    """Tokens of each name, where they lie end to end in the one row of the batch."""
    generators: Mapping[str, torch.Generator] = field(default_factory=dict, compare=False)
    """Where an adapter's dropout is drawn from, apart from its neighbours'; torch's default one if it has none."""

    @property
    def unique(self) -> tuple[str, ...]:
        """The adapters in use, in order of first appearance."""
        return tuple(dict.fromkeys(name for name in self.names if name is not None))

    @property
    def is_uniform(self) -> bool:
        """Whether all rows use the same."""
        return all(name == self.names[0] for name in self.names)

    def segments(self, shape: torch.Size, site: str) -> tuple[Segment, ...]:
        """The tokens of an input of this shape, (..., I), in runs of one adapter; refused if they do not fit."""
        tokens = shape[:-1].numel()
        if self.lengths is None:
            return _segments(self.names, (self.repeats(shape[0], site) * (tokens // shape[0]),) * len(self.names))
        if tokens != sum(self.lengths):
            raise RoutingError(Fault(f"routing at site '{site}'", f"an input of {tokens} tokens",
                                     f"{sum(self.lengths)}, the sum of the lengths",
                                     "Only layers that see every token of the packed row can be routed so"))
        return _segments(self.names, self.lengths)

    def repeats(self, size: int, site: str) -> int:
        """How many consecutive entries of a tensor's first dimension belong to each row.

        More than one where rows are flattened with their tokens, or repeated for beams; refused if it does not divide.
        """
        if self.lengths is not None:
            raise RoutingError(Fault(f"routing at site '{site}'", "tokens of one packed row", "rows of a batch",
                                     "This kind of layer cannot tell packed tokens apart: give each adapter its rows"))
        if size % len(self.names) or not size:
            raise RoutingError(Fault(
                f"routing at site '{site}'", f"an input of {size} rows", f"{len(self.names)} rows, or a multiple",
                "Give route() one name for each row of the batch"))
        return size // len(self.names)

    def rows(self, size: int, site: str, device: torch.device) -> dict[str | None, torch.Tensor]:
        """Indices into a first dimension of this size, by adapter (and `None` for the base)."""
        repeats = self.repeats(size, site)
        find = _rows.__wrapped__ if torch.compiler.is_compiling() else _rows  # the compiler warns of caches
        return dict(find(self.names, repeats, device))


@lru_cache(maxsize=64)
def _segments(names: tuple[str | None, ...], lengths: tuple[int, ...]) -> tuple[Segment, ...]:
    runs: list[Segment] = []
    start = 0
    for name, length in zip(names, lengths, strict=True):
        if runs and runs[-1].name == name:
            runs[-1] = runs[-1]._replace(stop=start + length)
        elif length:
            runs.append(Segment(name, start, start + length))
        start += length
    return tuple(runs)


@lru_cache(maxsize=64)
def _rows(names: tuple[str | None, ...], repeats: int,
          device: torch.device) -> tuple[tuple[str | None, torch.Tensor], ...]:
    groups: dict[str | None, list[int]] = {}
    for row, name in enumerate(names):
        groups.setdefault(name, []).extend(range(row * repeats, (row + 1) * repeats))
    return tuple((name, torch.tensor(index, device=device)) for name, index in groups.items())


@dataclass(slots=True)
class SwitchState:
    """The live state of one model. `route`, when set, stands above `mix`."""

    mix: dict[str, float] = field(default_factory=dict)
    """Adapters that are on, with their weights; empty is the base."""
    route: Route | None = None
    """One adapter for each row of the batch."""
    compute_dtype: torch.dtype | None = None
    """Dtype of the low-rank products; None is the activation's own."""
    workspace: Workspace = field(default_factory=Workspace)
    """Where quantized weights are unpacked, one strip after another, for all layers."""

    @contextmanager
    def only(self, name: str | None) -> Iterator[None]:
        """One adapter for every row: what holds inside a part of a batch that a host runs by itself."""
        before, self.route = self.route, Route((name,))
        try:
            yield
        finally:
            self.route = before
