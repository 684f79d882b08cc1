"""What one adapter holds at one place: a pair of factors, or a whole bias. Plain containers of parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deltaw.core.geometry import Geometry
from deltaw.core.methods import lora


class LowRank(nn.Module):
    """The factors of one adapter at one site, with their scale s and dropout."""

    def __init__(self, geometry: Geometry, A: Tensor, B: Tensor, *, scaling: float, dropout: float = 0.0,
                 trainable: bool = True) -> None:
        super().__init__()
        self.geometry, self.scaling, self.dropout = geometry, scaling, dropout
        self.lora_A = nn.Parameter(A, requires_grad=trainable)
        self.lora_B = nn.Parameter(B, requires_grad=trainable)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B, with B spread over all outputs where only slices change."""
        return self.lora_A, self.geometry.dense_out(self.lora_B)

    def delta(self, base: Tensor) -> Tensor:
        """ΔW in the base's layout, at least float32."""
        return lora.delta_weight(self.lora_A, self.lora_B, self.scaling, self.geometry)

    def tensors(self) -> dict[str, Tensor]:
        """Detached copies by their names in an adapter."""
        return {"lora_A": self.lora_A.detach().clone(), "lora_B": self.lora_B.detach().clone()}


class TrainedBias(nn.Module):
    """One adapter's own copy of a bias; its change is the difference to the base's."""

    def __init__(self, geometry: Geometry, bias: Tensor, *, trainable: bool = True) -> None:
        super().__init__()
        self.geometry = geometry
        self.bias = nn.Parameter(bias, requires_grad=trainable)

    def delta(self, base: Tensor) -> Tensor:
        """The change of the bias, at least float32 so that base + change rounds back to this very bias."""
        wide = torch.promote_types(torch.promote_types(base.dtype, self.bias.dtype), torch.float32)
        return self.bias.to(wide) - base.to(wide)

    def tensors(self) -> dict[str, Tensor]:
        """A detached copy by its name in an adapter."""
        return {"bias": self.bias.detach().clone()}


Slot = LowRank | TrainedBias
