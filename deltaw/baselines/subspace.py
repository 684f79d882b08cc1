"""Training in a random subspace, to measure how many dimensions a task needs (Li et al. 2018; Aghajanyan et al. 2020).

    DID     θ = θ₀ + P θ_d                          |Θ| = d
    SAID    θ_i = θ₀_i + λ_i · (P θ_{d-m})_i        |Θ| = d, of which m are the scales λ of the m layers

θ_d begins at zero and λ at one, so that training begins at θ₀: every parameter of the model, the head too. A layer is
one of the repeated blocks; what stands before them (embeddings) is one more, and what stands after them (a last norm,
a head) another. Weights are computed from θ_d each time they are used: P is never formed (see `fastfood`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from deltaw.baselines.fastfood import Fastfood
from deltaw.baselines.part import Holder, Part, Row
from deltaw.core.layers import floating
from deltaw.errors import ConfigError, Fault, TargetError
from deltaw.inject.blocks import named_layers

CHILD = "deltaw_subspace"


class Subspace(Part):
    """All of a model's parameters as functions of d values."""

    def __init__(self, model: nn.Module, *, dimension: int, structure_aware: bool, seed: int,
                 kept: Sequence[str] = ()) -> None:
        """`kept` names parameters whose start is drawn anew in each session and has to be saved, such as a head's."""
        self.kind = "said" if structure_aware else "did"
        self.model, self.dimension = model, dimension
        self.on = True
        named = dict(model.named_parameters())
        packed = [name for name, p in named.items() if not floating(p)]
        if packed:
            raise TargetError(Fault("method subspace", f"'{packed[0]}' holds {named[packed[0]].dtype} codes",
                                    "weights that are not quantized", "Load the base in bf16 or fp32"))
        self.layer_of = _layers(model, named) if structure_aware else dict.fromkeys(named, 0)
        self.layers = len(set(self.layer_of.values())) if structure_aware else 0
        if dimension <= self.layers:
            raise ConfigError(Fault("BaselineConfig.dimension", f"got {dimension}", f"more than {self.layers}, one "
                                    "for the scale of each layer", "Set structure_aware off for fewer"))
        device = next(iter(named.values())).device
        self.held = nn.Module()
        self.held.theta = nn.Parameter(torch.zeros(dimension - self.layers, device=device))
        if structure_aware:
            self.held.scales = nn.Parameter(torch.ones(self.layers, device=device))
        self.start = {name: named[name].detach().clone() for name in kept}
        self._install(named, torch.Generator().manual_seed(seed))
        model.add_module(CHILD, Holder(self.held))

    def parameters(self) -> dict[str, nn.Parameter]:
        """"subspace.theta" (d - m,) and, for SAID, "subspace.scales" (m,)."""
        return {f"subspace.{name}": parameter for name, parameter in self.held.named_parameters()}

    def kept_beside(self) -> dict[str, Tensor]:
        """θ₀ where it is drawn anew in each session."""
        return {f"start.{name}": tensor for name, tensor in self.start.items()}

    def turn(self, on: bool) -> None:
        """Use θ, or θ₀."""
        self.on = on

    def remove(self) -> None:
        """Give every module its own parameters back, in their order."""
        del self.model._modules[CHILD]
        for module, before in self.places:
            for leaf in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, leaf, leave_parametrized=False)
            module._parameters.clear()
            module._parameters.update(before)

    def rows(self) -> list[Row]:
        """One line: the d values."""
        return [Row("all parameters", self.kind, (sum(p.rows for p in self.projections.values()),), 0, self.dimension)]

    def _install(self, named: Mapping[str, nn.Parameter], generator: torch.Generator) -> None:
        total = sum(p.numel() for p in named.values())
        dimension = self.dimension - self.layers
        self.projections = {name: Fastfood(dimension, p.numel(), total=total, generator=generator, device=p.device)
                            for name, p in named.items()}
        by_id = {id(p): name for name, p in named.items()}
        self.places: list[tuple[nn.Module, dict[str, Any]]] = []
        for module in list(self.model.modules()):
            before = dict(module._parameters)
            held = {leaf: by_id[id(p)] for leaf, p in before.items() if p is not None}
            for leaf, name in held.items():
                parametrize.register_parametrization(module, leaf, _Moved(self, name), unsafe=True)
            if held:
                self.places.append((module, before))


class _Moved(nn.Module):
    """θ_i from θ₀_i."""

    def __init__(self, subspace: Subspace, name: str) -> None:
        super().__init__()
        # Not a submodule: the model holds the values once, and a cycle would make every walk of it repeat.
        object.__setattr__(self, "subspace", subspace)
        self.name = name

    subspace: Subspace

    def forward(self, start: Tensor) -> Tensor:
        """θ₀_i + λ_i·(Pθ)_i, of the start's dtype."""
        part = self.subspace
        if not part.on:
            return start
        start = part.start.get(self.name, start)
        theta: Tensor = part.held.theta  # type: ignore[assignment]
        if part.layers:  # λ(Pθ) = P(λθ), and d values are multiplied instead of all of the layer's
            theta = theta * part.held.scales[part.layer_of[self.name]]  # type: ignore[index]
        return start + part.projections[self.name](theta).view_as(start).to(start.dtype)


def _layers(model: nn.Module, named: Mapping[str, nn.Parameter]) -> dict[str, int]:
    """The number of the layer that each parameter belongs to, without gaps."""
    inside = [name for name, _ in named_layers(model)]
    found, seen = {}, False
    for name in named:
        number = next((i for i, layer in enumerate(inside) if name.startswith(f"{layer}.")), None)
        seen = seen or number is not None
        found[name] = number if number is not None else len(inside) + seen
    order = {number: i for i, number in enumerate(sorted(set(found.values())))}
    return {name: order[number] for name, number in found.items()}
