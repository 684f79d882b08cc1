"""A linear layer whose tokens belong to several adapters: which tensors each of them has here, and who computes.

Layers that share an input are computed together. Where all adapters lie in banks, the kernel is asked through `banked`,
else all go through `batched`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from deltaw.core import native_low_rank
from deltaw.core.banked import Entries, banked_linear
from deltaw.core.batched import Factors, Frozen, Group, grouped_linear
from deltaw.core.layers.shared_input import calls
from deltaw.core.state import Route

if TYPE_CHECKING:
    from deltaw.core.layers.linear import AdaptedLinear
    from deltaw.core.state import Segment


def grouped(layer: AdaptedLinear, x: Tensor) -> Tensor:
    """The output with every segment's own change, made together with those of the layers that share x."""
    route = layer.state.route
    assert route is not None
    segments, alone = route.segments(x.shape, layer.site), _draws(layer, route)

    def compute(layers: Sequence[AdaptedLinear]) -> Sequence[Tensor]:
        made = None if alone else _banked(x, segments, layers)
        if made is not None:
            return made
        groups = [Group(start, stop, [_factors(own, name) for own in layers], _dropout(layer, name),
                        route.generators.get(name)) for name, start, stop in segments if name is not None]
        return grouped_linear(x, [own.frozen(x) for own in layers], groups)

    if alone:
        return compute([layer])[0]
    followers = [other for other in layer.followers if _can_follow(other, x, route)]
    return calls.take(layer, x, route, followers, compute)


def add_grouped(layer: AdaptedLinear, y: Tensor, x: Tensor, route: Route) -> Tensor:
    """y of a host that is no plain product, a quantized one say, plus every segment's own change."""
    wide = x if layer.state.compute_dtype is None else x.to(layer.state.compute_dtype)
    groups = [Group(start, stop, [_factors(layer, name)], _dropout(layer, name), route.generators.get(name))
              for name, start, stop in route.segments(x.shape, layer.site) if name is not None]
    return y + grouped_linear(wide, [Frozen(None, None, y.shape[-1])], groups)[0].to(y.dtype)


def _banked(x: Tensor, segments: Sequence[Segment], layers: Sequence[AdaptedLinear]) -> Sequence[Tensor] | None:
    """The outputs, where every adapter lies in a bank and the kernel is for it."""
    if not native_low_rank.takes(x):
        return None
    slots = [layer.slots for layer in layers]
    own = [(name, (start, stop)) for name, start, stop in segments
           if name is not None and stop > start and any(name in some for some in slots)]
    first = layers[0]
    if first.entries is None:
        first.entries = Entries()
    entries = [entry for name, _ in own if (entry := first.entries.of(name, slots)) is not None]
    if len(entries) < len(own):
        return None
    return banked_linear(x, [layer.frozen(x) for layer in layers], [span for _, span in own], entries)


def _can_follow(layer: AdaptedLinear, x: Tensor, route: Route) -> bool:
    """`can_follow` for a batch of several adapters."""
    return (layer.is_unwatched() and layer.can_group(x) and layer.in_features == x.shape[-1]
            and not _draws(layer, route))


def _draws(layer: AdaptedLinear, route: Route) -> bool:
    """Whether some adapter of a route has dropout here, now."""
    return layer.training and not layer.dropping.isdisjoint(route.names)


def _dropout(layer: AdaptedLinear, name: str) -> float:
    """The dropout of an adapter here, now."""
    return layer.slots[name].dropout if layer.training and name in layer.dropping else 0.0


def _factors(layer: AdaptedLinear, name: str) -> Factors | None:
    """An adapter's change here, if it has one."""
    slot = layer.slots.get(name)
    if slot is None:
        return None
    if slot.place is not None:  # hundreds of adapters at hundreds of layers: asking the module is slow
        return Factors(*slot.place.factors, slot.scaling, slot.place)
    return Factors(*slot.factors(), slot.scaling)
