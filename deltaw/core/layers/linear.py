"""Linear layers: `nn.Linear`, its quantized kin, and transformers' `Conv1D`.

One adapter costs two small products. A batch whose rows use different adapters costs two batched products, over factors
stacked by row, padded to the largest rank; while nothing is differentiated the stack is kept until it goes stale.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.core.layers.adapted import Adapted
from deltaw.core.layers.slots import LowRank
from deltaw.core.methods import lora
from deltaw.core.state import Route

MAX_ROWS_PER_ADAPTER = 4
"""Above this many rows for each adapter, a pass for each adapter beats factors copied for each row."""


class AdaptedLinear(Adapted):
    """h = W₀x + s·B(Ax) on (..., I) → (..., O)."""

    bank: tuple[object, Tensor, Tensor] | None = None

    def drop(self, adapter: str) -> None:
        """Forget one adapter's slots, and the stack: the next one's factors may come to lie at the same addresses."""
        super().drop(adapter)
        self.bank = None

    def add_low_rank(self, y: Tensor, x: Tensor, slot: LowRank, weight: float) -> Tensor:
        """y + w·s·B(A x), with dropout on x in training."""
        if self.state.compute_dtype is not None:
            x = x.to(self.state.compute_dtype)
        if slot.dropout and self.training:
            x = F.dropout(x, slot.dropout)
        A, B = slot.factors()
        return lora.add_low_rank(y, x, A, B, slot.scaling * weight)

    def add_by_row(self, y: Tensor, x: Tensor, route: Route) -> Tensor:
        """All rows at once through stacked factors, unless few adapters share many rows, or dropout is drawn."""
        unique = [name for name in route.unique if name in self.slots]
        dropout = self.training and any(self.slots[name].dropout for name in unique)
        if dropout or any(name in self.biases for name in route.unique) \
                or len(route.names) > MAX_ROWS_PER_ADAPTER * len(unique):
            return super().add_by_row(y, x, route)
        self.rows(x, route)
        dtype = x.dtype if self.state.compute_dtype is None else self.state.compute_dtype
        A_BRI, B_BOR = self.stacked(route, unique, dtype)
        rows = len(route.names)
        out = lora.add_low_rank_by_row(y.reshape(rows, -1, y.shape[-1]),
                                       x.to(dtype).reshape(rows, -1, x.shape[-1]), A_BRI, B_BOR)
        return out.view(y.shape)

    def stacked(self, route: Route, unique: list[str], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (B, R, I) and s·B (B, O, R) for the rows of a route, with zeros for rows that change nothing here."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._stack(route, unique, dtype)
        slots = [self.slots[name] for name in unique]
        key = (route.names, dtype, tuple((p.data_ptr(), p._version) for s in slots for p in (s.lora_A, s.lora_B)))
        if self.bank is None or self.bank[0] != key:
            self.bank = (key, *self._stack(route, unique, dtype))
        return self.bank[1], self.bank[2]

    def _stack(self, route: Route, unique: list[str], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        factors = [self.slots[name].factors() for name in unique]
        width = max(A.shape[0] for A, _ in factors)
        A_NRI = torch.stack([F.pad(A.to(dtype), (0, 0, 0, width - A.shape[0])) for A, _ in factors])
        B_NOR = torch.stack([F.pad((B * self.slots[name].scaling).to(dtype), (0, width - B.shape[1]))
                             for name, (_, B) in zip(unique, factors, strict=True)])
        if tuple(unique) == route.names:
            return A_NRI, B_NOR
        position = {name: i for i, name in enumerate(unique)}
        index = torch.tensor([position.get(name, 0) if name is not None else 0 for name in route.names],
                             device=A_NRI.device)
        on = torch.tensor([name in position for name in route.names], device=A_NRI.device, dtype=dtype)
        return A_NRI.index_select(0, index), B_NOR.index_select(0, index) * on.view(-1, 1, 1)
