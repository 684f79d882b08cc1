"""What one adapter holds at one place: a pair of factors, or a whole bias. Plain containers of parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deltaw.core.bank import Place
from deltaw.core.geometry import Geometry
from deltaw.core.methods import lora, pissa


class LowRank(nn.Module):
    """The factors of one adapter at one site, with their scale s and dropout."""

    start_A: Tensor | None
    start_B: Tensor | None

    def __init__(self, geometry: Geometry, A: Tensor, B: Tensor, *, scaling: float, dropout: float = 0.0,
                 trainable: bool = True, start: tuple[Tensor, Tensor] | None = None,
                 rest_in_base: bool = False) -> None:
        """`start` are factors to count the change from (PiSSA, LoftQ); with `rest_in_base` the layer's own weight
        lacks them while this is on, so that only what is stored takes them off."""
        super().__init__()
        self.geometry, self.scaling, self.dropout = geometry, scaling, dropout
        self.lora_A = nn.Parameter(A, requires_grad=trainable)
        self.lora_B = nn.Parameter(B, requires_grad=trainable)
        self.rest_in_base = rest_in_base
        self.place: Place | None = None
        """Where the factors lie in a bank, while many adapters train together."""
        for name, factor in zip(("start_A", "start_B"), start or (None, None), strict=True):
            self.register_buffer(name, factor, persistent=False)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B as the layer adds them, with B spread over all outputs where only slices change."""
        A, B = (self.lora_A, self.lora_B) if self.rest_in_base else self.difference()
        return A, self.geometry.dense_out(B)

    @property
    def is_plain(self) -> bool:
        """Whether the layer adds the parameters as they are, which are both trained."""
        return (self.geometry.kind == "linear" and not self.geometry.slices and self.lora_A.requires_grad
                and self.lora_B.requires_grad and (self.rest_in_base or self.start_A is None))

    def difference(self) -> tuple[Tensor, Tensor]:
        """A and B of the change to the base as it was given: BA, or BA - B₀A₀ at twice the rank."""
        if self.start_A is None or self.start_B is None:
            return self.lora_A, self.lora_B
        return pissa.joined((self.lora_A, self.lora_B), (self.start_A, -self.start_B), self.geometry)

    def delta(self, base: Tensor) -> Tensor:
        """ΔW in the base's layout, at least float32."""
        A, B = (self.lora_A, self.lora_B) if self.rest_in_base else self.difference()
        return lora.delta_weight(A, B, self.scaling, self.geometry)

    def tensors(self) -> dict[str, Tensor]:
        """Detached copies by their names in an adapter."""
        A, B = self.difference()
        return {"lora_A": A.detach().clone(), "lora_B": B.detach().clone()}


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
