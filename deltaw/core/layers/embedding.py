"""Embeddings: ΔW (V, D) = s·(BA)ᵀ, so a token's change is its column of A times Bᵀ."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.core.layers.adapted import Adapted
from deltaw.core.layers.slots import LowRank
from deltaw.core.state import Route


class AdaptedEmbedding(Adapted):
    """y = W₀[ids] + s·(Aᵀ[ids]) Bᵀ, times the host's own scale of embeddings where it has one (Gemma)."""

    token_by_token = True

    def add_by_row(self, y: Tensor, x: Tensor, route: Route) -> Tensor:
        """Each row's own change; ids that all rows share, such as positions of shape (1, T), get an output for each."""
        if x.dim() > 1 and x.shape[0] == 1 and route.lengths is None:
            y, x = (t.expand(len(route.names), *t.shape[1:]) for t in (y, x))
        return super().add_by_row(y, x, route)

    def add_low_rank(self, y: Tensor, x: Tensor, slot: LowRank, weight: float) -> Tensor:
        """The change of the looked-up rows; dropout has nothing to act on, for the input is a choice of rows."""
        host = self.host
        assert isinstance(host, nn.Embedding)
        dtype = y.dtype if self.state.compute_dtype is None else self.state.compute_dtype
        A, B = slot.factors()
        h = F.embedding(x, A.t().to(dtype), padding_idx=host.padding_idx, sparse=False)
        change = F.linear(h, B.to(dtype)) * (slot.scaling * weight)
        scale = embedding_scale(host)
        return y + (change if scale is None else change * scale).to(y.dtype)


def embedding_scale(host: nn.Embedding) -> Tensor | float | None:
    """The factor by which a subclass multiplies its rows (transformers' `embed_scale`), or None."""
    if type(host).forward is nn.Embedding.forward:
        return None
    scale: Tensor | float = host.embed_scale  # type: ignore[assignment]  # inject refuses subclasses without it
    return scale
