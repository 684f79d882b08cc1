"""Packed weights that adapters bring for the layers they change, put in place while they are on (LoftQ, PiSSA).

Such an adapter was started with a packed weight of its own, so it can be on alone only: with another one, or routed to
some rows, the layer would have to compute with two weights at once. The base's own tensors are kept and put back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from deltaw.bases.packed import give_back, take_over
from deltaw.core.layers import parameter_owner, replace_parameter
from deltaw.errors import Fault, StateError

Place = tuple[nn.Module, str, nn.Parameter]
"""A layer, the path of its weight, and an adapter's own weight for it."""


class OwnWeights:
    """Which adapters bring weights, and whose are in place."""

    def __init__(self) -> None:
        self._brought: dict[str, list[Place]] = {}
        self._on: str | None = None
        self._aside: list[tuple[nn.Module, str, Tensor, dict[str, Any]]] = []

    def keep(self, name: str, places: list[Place]) -> None:
        """Keep what an adapter brings."""
        if places:
            self._brought[name] = places

    def drop(self, name: str) -> None:
        """Forget what an adapter brought; the base's are put back if it was on."""
        if self._on == name:
            self.wear({})
        self._brought.pop(name, None)

    def check(self, mix: Mapping[str, float]) -> None:
        """Refuse a mix in which an adapter with its own weights is not alone."""
        bringing = [name for name in mix if name in self._brought]
        if bringing and (len(mix) > 1 or mix[bringing[0]] != 1.0):
            raise StateError(Fault(f"adapter '{bringing[0]}'", f"has packed weights of its own, and is in the mix "
                                   f"{dict(mix)}", "that adapter alone, with the weight 1",
                                   "Save and load it: a loaded adapter changes the base's own weights"))

    def check_route(self, names: Sequence[str | None]) -> None:
        """Refuse to route rows to an adapter with its own weights."""
        for name in names:
            if name in self._brought:
                raise StateError(Fault(f"route to '{name}'", "it has packed weights of its own", "adapters that change "
                                       "the base's own weights", "Save and load it, or call use()"))

    def wear(self, mix: Mapping[str, float]) -> None:
        """Put in place what this mix needs: an adapter's own weights, or the base's; StateError if it needs both."""
        self.check(mix)
        wanted = next((name for name in mix if name in self._brought), None)
        if wanted == self._on:
            return
        for module, leaf, original, facts in reversed(self._aside):
            replace_parameter(module, leaf, original)
            give_back(module, facts)
        self._aside, self._on = [], wanted
        for host, path, own in self._brought.get(wanted or "", ()):
            module, leaf = parameter_owner(host, path)
            facts = take_over(module, own)
            self._aside.append((module, leaf, replace_parameter(module, leaf, own), facts))

    @contextmanager
    def worn(self, mix: Mapping[str, float]) -> Iterator[None]:
        """What this mix needs, for the length of a block."""
        before = {} if self._on is None else {self._on: 1.0}
        self.wear(mix)
        try:
            yield
        finally:
            self.wear(before)

    @contextmanager
    def off(self) -> Iterator[None]:
        """The base's own weights, for the length of a block."""
        with self.worn({}):
            yield

    def settle(self, merged: Sequence[tuple[nn.Module, str, Tensor]]) -> None:
        """Leave what was merged into these places for good, and put the base's own weights back in the others."""
        kept = {(module, leaf) for module, leaf, _ in merged}
        self._aside = [entry for entry in self._aside if (entry[0], entry[1]) not in kept]
        self.wear({})
