"""Adapters that train together, laid out in banks: those of one layout side by side (`core.bank`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deltaw.core.bank import Bank
from deltaw.core.layers import LowRank
from deltaw.switch.switchboard import Switchboard

Layout = tuple[object, ...]
"""Where an adapter changes what, in which shapes and format: adapters of one layout share a bank."""


class Banks:
    """The banks of a switchboard's adapters. An adapter that has parts of another kind lies in none."""

    def __init__(self, board: Switchboard) -> None:
        self.board = board
        self.held: dict[Layout, tuple[str, ...]] = {}
        self.names: tuple[str, ...] = ()

    def hold(self, names: Sequence[str]) -> None:
        """From now on these adapters, and no others, lie in banks; gradients in a bank that changes are gone."""
        if tuple(names) == self.names:
            return
        self.names = tuple(names)
        wanted: dict[Layout, dict[str, list[LowRank]]] = {}
        for name in names:
            slots = self._slots(name)
            if slots:
                wanted.setdefault(_layout(slots), {})[name] = list(slots.values())
        for layout in [layout for layout, held in self.held.items() if held != tuple(wanted.get(layout, ()))]:
            self._release(self.held.pop(layout), keep=names)
        for layout, adapters in wanted.items():
            if layout not in self.held:
                _place(list(adapters.values()))
                self.held[layout] = tuple(adapters)

    def _release(self, names: Sequence[str], *, keep: Sequence[str]) -> None:
        """Take adapters out of their bank; those not to `keep`, which come to lie in another, get their own memory."""
        for name in set(names) & set(self.board.names):
            for slot in self._slots(name).values():
                if slot.place is not None and name not in keep:
                    slot.place.leave()
                slot.place = None

    def _slots(self, name: str) -> dict[str, LowRank]:
        """An adapter's slots by host, in the order of the model; none where some are no plain pairs of factors."""
        found = list(self.board.slots(name))
        plain = {host: slot for host, _, slot in found if isinstance(slot, LowRank) and slot.is_plain}
        return plain if len(plain) == len(found) and 2 * len(plain) == len(self.board.parameters(name)) else {}


def _place(adapters: Sequence[Sequence[LowRank]]) -> None:
    """Lay the factors of adapters of one layout in a bank."""
    bank = Bank([[(slot.lora_A, slot.lora_B) for slot in slots] for slots in adapters])
    for slots, places in zip(adapters, bank.places, strict=True):
        for slot, place in zip(slots, places, strict=True):
            slot.place = place


def _layout(slots: dict[str, LowRank]) -> Layout:
    shapes: list[tuple[str, torch.Size, torch.Size, torch.dtype, torch.device]] = []
    for host, slot in slots.items():
        shapes.append((host, slot.lora_A.shape, slot.lora_B.shape, slot.lora_A.dtype, slot.lora_A.device))
    return tuple(shapes)
