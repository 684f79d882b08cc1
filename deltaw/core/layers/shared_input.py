"""Projections of one input: q, k and v, or gate and up, are given the very same tensor one after another.

Under training the first of them computes all of them, as one node of the autograd graph, and the others find their
output ready. While a compiler traces them, the first makes the narrow products xAᵀ of all (`Narrow`). Who they are is
not read from names: `watching` a forward shows which layers are called in a row with one tensor. That is an explicit
step before training and not learned on the way, so that the first step, a step after resuming and a recomputed layer do
the same arithmetic as any other.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Calls(threading.local):
    """The most recent shared input of this thread, and the outputs that were made ahead of their layers' turn."""

    def __init__(self) -> None:
        self.input: weakref.ref[Tensor] | None = None
        self.version, self.key = 0, None
        self.ready: dict[int, tuple[object, Tensor]] = {}
        self.watcher: Callable[[Any, Tensor], None] | None = None

    def take(self, layer: object, x: Tensor, key: Any, followers: Sequence[Any],
             compute: Callable[[list[Any]], Sequence[Tensor]]) -> Tensor:
        """This layer's output for x: made ahead, or made now, with those of the layers that are expected to follow.

        `compute` gives the outputs of some layers that share x; `key` has to be the same from the first to the last.
        """
        same = self.input is not None and self.input() is x and self.version == x._version and self.key == key
        if same and id(layer) in self.ready:
            return self.ready.pop(id(layer))[1]
        outputs = compute([layer, *followers])
        # The layers are kept beside their outputs, so that an id cannot come to mean another layer.
        self.ready = {id(other): (other, y) for other, y in zip(followers, outputs[1:], strict=True)}
        self.input, self.version, self.key = (weakref.ref(x), x._version, key) if followers else (None, 0, None)
        return outputs[0]


calls = Calls()


@contextmanager
def watched_by(watcher: Callable[[Any, Tensor], None]) -> Iterator[None]:
    """Let `watcher` be told of each layer that is called in the block, and its input."""
    calls.watcher = watcher
    try:
        yield
    finally:
        calls.watcher = None


@contextmanager
def watching() -> Iterator[list[list[Any]]]:
    """Runs of layers that were called in a row with one tensor, in the order of the forward inside the block."""
    runs: list[list[Any]] = []
    inputs: list[Tensor] = []

    def note(layer: Any, x: Tensor) -> None:
        if inputs and x is inputs[-1]:
            runs[-1].append(layer)
        else:
            runs.append([layer])
        inputs[:] = [x]  # kept, so that the next tensor is not taken for it

    with watched_by(note):
        yield runs


class Narrow:
    """xAᵀ of all layers of one input as one product, while a compiler traces the layers one after another.

    The compiler follows what is kept here from layer to layer, and sees plain operations. Nothing is left here at the
    end of a forward, since the last layer takes the rest away.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = tuple(layers)
        self.x: Tensor | None = None
        self.parts: tuple[Tensor, ...] = ()

    def of(self, place: int, x: Tensor, adapter: str) -> Tensor:
        """xAᵀ (..., R) of the layer at this place, for one adapter that all layers have."""
        def compute(layers: Sequence[Any]) -> Sequence[Tensor]:
            A = [layer.slots[adapter].factors()[0].to(x.dtype) for layer in layers]
            return torch.split(F.linear(x, torch.cat(A)), [A_RI.shape[0] for A_RI in A], -1)

        return self.taken(place, x, compute)

    def taken(self, place: int, x: Tensor, compute: Callable[[Sequence[Any]], Sequence[Tensor]]) -> Tensor:
        """What is computed from x for the layer at this place, at once for all of them."""
        if place == 0:
            self.x, self.parts = x, tuple(compute(self.layers))
        elif self.x is not x:  # the first was not called with this
            return compute([self.layers[place]])[0]
        found = self.parts[place]
        if place == len(self.layers) - 1:
            self.x, self.parts = None, ()
        return found
