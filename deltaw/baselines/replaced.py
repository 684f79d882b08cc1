"""Parameters of the base that are trained themselves: full fine-tuning, the top layers, biases, norms, the head.

Each is trained in a copy that stands in its place, so that the base's own tensor is there for the undo, bit by bit.
`forget` drops those, for training without a second set of weights in memory.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from deltaw.baselines.part import Part
from deltaw.core.layers import floating
from deltaw.errors import Fault, StateError, TargetError


class Replaced(Part):
    """Some of the model's own parameters."""

    def __init__(self, kind: str, model: nn.Module, names: Iterable[str]) -> None:
        self.kind = kind
        by_name = dict(model.named_parameters(remove_duplicate=False))
        wanted = {id(by_name[name]) for name in names}
        self.places: dict[str, list[tuple[nn.Module, str]]] = {}
        self.own: dict[str, nn.Parameter] = {}
        first: dict[int, str] = {}
        for prefix, module in model.named_modules():
            for leaf, parameter in module._parameters.items():
                name = f"{prefix}.{leaf}" if prefix else leaf
                if parameter is not None and id(parameter) in wanted:
                    shown = first.setdefault(id(parameter), name)
                    self.own.setdefault(shown, parameter)
                    self.places.setdefault(shown, []).append((module, leaf))
        packed = [name for name, parameter in self.own.items() if not floating(parameter)]
        if packed:
            raise TargetError(Fault(f"method {kind}", f"'{packed[0]}' holds {self.own[packed[0]].dtype} codes",
                                    "weights that are not quantized", "Load the base in bf16 or fp32"))
        with torch.inference_mode(False):
            self.trained = {name: nn.Parameter(p.detach().clone()) for name, p in self.own.items()}
        self.turn(True)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The copies, by the parameter's name in the model; one that is tied has the first of its names."""
        return dict(self.trained)

    def turn(self, on: bool) -> None:
        """Put the copies in place, or the base's own."""
        if not on and not self.own:
            raise StateError(Fault("the base", "was forgotten, to save memory", "its own weights", "Load it again"))
        tensors = self.trained if on else self.own
        for name, places in self.places.items():
            for module, leaf in places:
                module._parameters[leaf] = tensors[name]

    def remove(self) -> None:
        """Put the base's own back."""
        self.turn(False)

    def forget(self) -> None:
        """Drop the base's own tensors: `turn(False)` and `remove` are then refused."""
        self.own = {}
