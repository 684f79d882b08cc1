"""Projections of one input: q, k and v, or gate and up, are given the very same tensor one after another.

Under training the first of them computes all of them, as one node of the autograd graph, and the others find their
output ready. Who they are is not read from names: `watching` a forward shows which layers are called in a row with one
tensor. That is an explicit step before training and not learned on the way, so that the first step, a step after
resuming and a recomputed layer do the same arithmetic as any other.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor


class Calls(threading.local):
    """The most recent shared input of this thread, and the outputs that were made ahead of their layers' turn."""

    def __init__(self) -> None:
        self.input: weakref.ref[Tensor] | None = None
        self.version, self.key = 0, None
        self.ready: dict[int, tuple[object, Tensor]] = {}
        self.watched: list[list[Any]] | None = None
        self.watched_input: Tensor | None = None

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

    def watch(self, layer: object, x: Tensor) -> None:
        """Note that a layer is called with x, where somebody watches."""
        if self.watched is None:
            return
        if x is self.watched_input:
            self.watched[-1].append(layer)
        else:
            self.watched.append([layer])
        self.watched_input = x  # kept, so that the next tensor is not taken for it


calls = Calls()


@contextmanager
def watching() -> Iterator[list[list[Any]]]:
    """Runs of layers that were called in a row with one tensor, in the order of the forward inside the block."""
    groups: list[list[Any]] = []
    calls.watched = groups
    try:
        yield groups
    finally:
        calls.watched = calls.watched_input = None
