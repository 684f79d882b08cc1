"""Modules trained in full and kept with the adapter (`modules_to_save`), such as a classification head.

Each adapter has a copy of the host. With one adapter on at weight 1 its copy runs instead of the host; a mix adds the
differences, host + Σ w·(copy - base), where host has the other adapters' changes and base has none; a routed batch
runs each row through its own adapter's copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from deltaw.core.layers.adapted import Adapted, quoted
from deltaw.core.layers.substituted import join_rows, select_rows
from deltaw.core.state import SwitchState

SAVED_CHILD = "deltaw_saved"


class AdaptedModule(Adapted):
    """A host that hands its input to an adapter's copy of itself."""

    child_name = SAVED_CHILD

    def __init__(self, host: nn.Module, site: str, state: SwitchState) -> None:
        super().__init__(host, site, state)
        self.copies: dict[str, nn.Module] = {}

    def keep(self, adapter: str, copy: nn.Module) -> None:
        """Hold an adapter's copy of the host."""
        self.add_module(f"copy:{quoted(adapter)}", copy)
        self.copies[adapter] = copy

    def drop(self, adapter: str) -> None:
        """Forget an adapter's copy."""
        copy = self.copies.pop(adapter, None)
        for name, child in list(self._modules.items()):
            if copy is not None and child is copy:
                del self._modules[name]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of whichever module is on."""
        route = self.state.route
        if route is not None:
            return self._by_row(args, kwargs)
        mix = self.state.mix
        on = {name: weight for name, weight in mix.items() if name in self.copies}
        if on and list(mix.values()) == [1.0]:
            return self.copies[next(iter(on))](*args, **kwargs)
        output = self.inner(*args, **kwargs)
        if not on:
            return output
        base = output
        if len(mix) > len(on):
            with self.state.only(None):
                base = self.inner(*args, **kwargs)
        changes = [(self.copies[name](*args, **kwargs) - base) * weight for name, weight in on.items()]
        return sum(changes, start=output)

    def _by_row(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        route = self.state.route
        assert route is not None
        size = args[0].shape[0] if args else next(iter(kwargs.values())).shape[0]
        parts = []
        for name, rows in route.rows(size, self.site, torch.device("cpu")).items():
            some, named = select_rows(args, kwargs, rows, size)
            run = self.copies[name] if name is not None and name in self.copies else self.inner
            with self.state.only(name):
                parts.append((rows, run(*some, **named)))
        return join_rows(parts, 0)
