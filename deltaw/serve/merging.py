"""One adapter in the weights, while it is the only one that is asked for.

Merged, an adapter costs nothing at all. As soon as anything else is asked for, the base's own tensors are put back, the
same objects, and everybody runs beside each other again; sequences that are under way go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch
from torch import nn

from deltaw.core.layers import floating
from deltaw.core.state import SwitchState
from deltaw.inject import Hosts, SiteMap
from deltaw.serve.banks import Factors
from deltaw.serve.request import BASE, Blend, Sequence
from deltaw.switch.merging import Merged, Swap, apply_merge, undo_merge


class AutoMerge:
    """Merges a blend that has been alone for `after` seconds; `choose` says which is in the weights now."""

    def __init__(self, model: nn.Module, site_map: SiteMap, *, after: float) -> None:
        self._hosts, self._site_map, self.after = Hosts(model, SwitchState()), site_map, after
        self.merged: Blend = BASE
        self.merges = 0
        self._undo: Merged | None = None
        self._alone: Blend = BASE
        self._since = 0.0

    def choose(self, sequences: Iterable[Sequence], factors: Callable[[Blend], Factors]) -> Blend | None:
        """Merge or undo, by who runs and waits; the blend that is in the weights, or None."""
        asked = {sequence.blend for sequence in sequences}
        now = time.monotonic()
        if len(asked) != 1 or asked != {self._alone}:
            self.undo()
            self._alone, self._since = (next(iter(asked)) if len(asked) == 1 else BASE), now
        elif self._alone != BASE and self._undo is None and now - self._since >= self.after:
            try:
                self.merge(self._alone, factors(self._alone))
            except Exception:  # it runs beside the base then, or what is wrong with it is told there
                self.undo()
                self._since = float("inf")
        return self.merged if self._undo is not None else None

    @torch.no_grad()
    def merge(self, blend: Blend, factors: Factors) -> None:
        """Put a blend into the weights, unless one of them is quantized."""
        swaps = []
        for name, (A_RI, B_RO) in factors.items():
            site = self._site_map.weights[name]
            base = self._hosts.model.get_submodule(site.host).get_parameter(site.parameter)
            if not floating(base):
                self._since = float("inf")
                return
            total = base.to(torch.promote_types(base.dtype, torch.float32), copy=True)
            (total.t() if site.geometry.transposed else total).addmm_(B_RO.t().to(total), A_RI.to(total))
            swaps.append(Swap(site.host, site.parameter, total.to(base.dtype)))
        self.undo()
        self._undo = Merged({}, {})
        apply_merge(self._hosts, swaps, self._undo)
        self.merged = blend
        self.merges += 1

    def undo(self) -> None:
        """Put the base's own tensors back."""
        if self._undo is not None:
            undo_merge(self._undo)
            self._undo, self.merged = None, BASE
