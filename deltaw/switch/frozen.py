"""A base that is frozen: no gradients to its parameters, and no other order of its codes."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from deltaw.core.packed import keep_order, may_reorder


class Frozen:
    """What `freeze` changed, for `thaw` to undo."""

    def __init__(self) -> None:
        self._trained: list[Tensor] = []
        self._reordering: list[nn.Module] = []

    def freeze(self, model: nn.Module, parameters: Iterable[Tensor]) -> None:
        """Stop gradients to these parameters, and let no packed layer be reordered in evaluation."""
        self._trained = [p for p in parameters if p.requires_grad]
        for parameter in self._trained:
            parameter.requires_grad_(False)
        self._reordering = keep_order(model)

    def thaw(self) -> None:
        """Everything as it was before."""
        for parameter in self._trained:
            parameter.requires_grad_(True)
        may_reorder(self._reordering)
