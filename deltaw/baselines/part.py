"""`Part`: one thing that a method puts on a model. A method is a list of parts: LoRA + PreEmbed has two, BitFit one.

A part holds parameters, can be off (the model is then the base, to the bit) and can be taken off for good.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deltaw.errors import AdapterFileError, Fault


@dataclass(frozen=True, slots=True)
class Row:
    """One line of what a method changes."""

    site: str
    kind: str
    shape: tuple[int, ...]
    rank: int
    parameters: int


class Part(ABC):
    """What a method trains at some places of a model."""

    kind: str
    """A word for tables."""

    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained tensors by name, "<site>.<tensor>"."""

    @abstractmethod
    def turn(self, on: bool) -> None:
        """Let it take effect, or leave the base as it was."""

    @abstractmethod
    def remove(self) -> None:
        """Take it off the model, whose tensors and modules are then what they were."""

    def values(self) -> dict[str, Tensor]:
        """What is kept of it: what it learned, in the form that is used after training."""
        return {name: p.detach() for name, p in self.parameters().items()}

    def kept_beside(self) -> dict[str, Tensor]:
        """Tensors that it did not learn and cannot do without in another session."""
        return {}

    def put(self, values: Mapping[str, Tensor]) -> None:
        """Take up what was kept: the tensors of `values` and `kept_beside`."""
        fill({**self.parameters(), **self.kept_beside()}, values)

    def rows(self) -> list[Row]:
        """What is changed, line by line."""
        return [Row(name, self.kind, tuple(value.shape), 0, value.numel()) for name, value in self.values().items()]


class Holder(nn.Module):
    """What a part keeps on a model; passes on what it is given, for a Sequential runs all of its children."""

    def __init__(self, held: nn.Module) -> None:
        super().__init__()
        self.held = held

    def forward(self, x: Tensor) -> Tensor:
        """x itself."""
        return x


class Hooked(Part):
    """A part that works by hooks, and whose tensors are in a module of its own on the model."""

    def __init__(self) -> None:
        self.on = True
        self.handles: list[RemovableHandle] = []
        self.children: list[tuple[nn.Module, str]] = []

    def keep(self, owner: nn.Module, name: str, child: nn.Module) -> None:
        """Make `child` a part of the model."""
        if name in owner._modules:
            raise AssertionError(f"{name} is there already")
        owner.add_module(name, Holder(child).train(owner.training))
        self.children.append((owner, name))

    def turn(self, on: bool) -> None:
        """Let the hooks act, or not."""
        self.on = on

    def remove(self) -> None:
        """Take hooks and modules off."""
        for handle in self.handles:
            handle.remove()
        for owner, name in self.children:
            del owner._modules[name]


def fill(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy values into tensors of the same names and shapes; every misfit is told at once."""
    faults = [Fault(f"tensor '{name}'", "is missing", "each of the method's tensors")
              for name in parameters if name not in values]
    faults += [Fault(f"tensor '{name}'", "is unknown", "only the method's tensors on this base")
               for name in values if name not in parameters]
    faults += [Fault(f"tensor '{name}'", f"has shape {tuple(values[name].shape)}", f"{tuple(parameter.shape)}")
               for name, parameter in parameters.items()
               if name in values and values[name].shape != parameter.shape]
    if faults:
        raise AdapterFileError(*faults)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
