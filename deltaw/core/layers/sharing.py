"""Which linear layers share an input or train in plain operations: found by watching a forward, before training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from deltaw.core.layers.linear import AdaptedLinear
from deltaw.core.layers.shared_input import Narrow, watched_by


def share(runs: Sequence[Sequence[AdaptedLinear]]) -> list[Sequence[AdaptedLinear]]:
    """Let the layers of each run, which get one tensor, be computed together; those called more than once stay alone.

    Returns the groups of two and more.
    """
    times = Counter(id(layer) for run in runs for layer in run)
    groups: list[Sequence[AdaptedLinear]] = []
    for run in runs:
        steady = [layer for layer in run if times[id(layer)] == 1]
        for layer in run:
            layer.followers, layer.narrow = (), None
        if len(steady) > 1:
            steady[0].followers = tuple(steady[1:])
            narrow = Narrow(steady)
            for place, layer in enumerate(steady):
                layer.narrow, layer.place = narrow, place
            groups.append(steady)
    return groups


def plain_layers(forward: Callable[[], object]) -> dict[str, tuple[str, ...]]:
    """Watch one forward: the sites, by reason, that train in plain operations instead of as one fused node.

    Both compute the same. Layers without an active adapter are left out.
    """
    found: dict[str, list[str]] = {}

    def note(layer: AdaptedLinear, x: Tensor) -> None:
        reason = layer.obstacle(x, training=True) if layer.active() else ""
        if reason and layer.site not in found.setdefault(reason, []):
            found[reason].append(layer.site)

    with torch.no_grad(), watched_by(note):
        forward()
    return {reason: tuple(sites) for reason, sites in found.items()}
