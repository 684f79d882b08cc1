"""`Adapted`: the part that is put on a module of the base so that it adds its adapters' changes.

The host module keeps its class, its name and its parameters. `Adapted` becomes a child of it and takes over its
`forward`: run the host's own forward, then add what the shared state says is on. It knows slots and a state to read;
which adapters exist, which are on and when that changes is the switchboard's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deltaw.core.layers.slots import LowRank, Slot, TrainedBias
from deltaw.core.packed import wrapped
from deltaw.core.state import Route, SwitchState
from deltaw.errors import Fault, RoutingError

CHILD = "deltaw"

Rows = Literal["first", "second", "gathered"]
"""Where a host's input has the rows of the batch: the first dimension, the second, or (2-D) in an unknown order."""


class Adapted(nn.Module):
    """A host with slots by parameter and adapter. This class handles biases; subclasses add low-rank changes."""

    child_name = CHILD
    token_by_token = False
    """Whether what this kind of layer adds to a token depends on that token alone."""

    def __init__(self, host: nn.Module, site: str, state: SwitchState, *, rows: Rows = "first") -> None:
        super().__init__()
        self.site, self.state, self.rows_are = site, state, rows
        self.parts: dict[str, dict[str, Slot]] = {}
        self.slots: dict[str, LowRank] = {}  # the slots of the main weight, at hand for the forward
        self.biases: dict[str, TrainedBias] = {}
        self.dropping: set[str] = set()  # adapters with dropout here
        # Not a submodule: the host owns this object, and a cycle would make every walk of the model repeat.
        object.__setattr__(self, "host", host)
        self.inner: Callable[..., Any] = host.forward
        self.own_forward = host.__dict__.get("forward")

    host: nn.Module

    def install(self) -> None:
        """Become the host's child and its forward."""
        self.host.add_module(self.child_name, self)
        self.host.forward = self.forward

    def uninstall(self) -> None:
        """Leave the host as it was found."""
        del self.host._modules[self.child_name]
        if self.host.__dict__.get("forward") == self.forward:
            del self.host.__dict__["forward"]
            if self.own_forward is not None:
                self.host.forward = self.own_forward

    def put(self, parameter: str, adapter: str, slot: Slot) -> None:
        """Hold a slot for one adapter at one parameter of the host."""
        self.parts.setdefault(parameter, {})[adapter] = slot
        slot.training = self.training
        self.add_module(_key(parameter, adapter), slot)
        if isinstance(slot, TrainedBias):
            self.biases[adapter] = slot
            return
        self.slots[adapter] = slot
        if slot.dropout:
            self.dropping.add(adapter)

    def drop(self, adapter: str) -> None:
        """Forget one adapter's slots."""
        for parameter in list(self.parts):
            if self.parts[parameter].pop(adapter, None) is not None:
                del self._modules[_key(parameter, adapter)]
            if not self.parts[parameter]:
                del self.parts[parameter]
        self.slots.pop(adapter, None)
        self.biases.pop(adapter, None)
        self.dropping.discard(adapter)

    def changes(self, mix: Mapping[str, float]) -> Iterator[tuple[str, list[tuple[Slot, float]]]]:
        """For each parameter that these adapters change: its path below the host, and the slots with their weights."""
        for parameter, slots in self.parts.items():
            present = [(slots[name], weight) for name, weight in mix.items() if name in slots]
            if present:
                yield parameter, present

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The host's output plus what is on; the input may be given by name."""
        y = self.host_output(*args, **kwargs)
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        route, mix = self.state.route, self.state.mix
        if route is not None:
            if not route.is_uniform:
                return self.add_by_row(y, x, route)
            mix = dict.fromkeys(route.unique, 1.0)
        for name, weight in mix.items():
            y = self.add(y, x, name, weight)
        return y

    def host_output(self, *args: Any, **kwargs: Any) -> Any:
        """What the host gives without adapters."""
        return self.inner(*args, **kwargs)

    def add(self, y: Tensor, x: Tensor, adapter: str, weight: float) -> Tensor:
        """y plus one adapter's change, weighted; y itself where the adapter has nothing here."""
        slot = self.slots.get(adapter)
        if slot is not None:
            y = self.add_low_rank(y, x, slot, weight)
        bias = self.biases.get(adapter)
        return y if bias is None else self.add_bias(y, bias, weight)

    def add_low_rank(self, y: Tensor, x: Tensor, slot: LowRank, weight: float) -> Tensor:
        """y plus w·s·B(A x); each kind of layer has its own."""
        raise NotImplementedError(f"{type(self).__name__} has no low-rank change")

    def add_bias(self, y: Tensor, bias: TrainedBias, weight: float) -> Tensor:
        """y plus the change of the bias, along the dimension that the bias of this host runs over."""
        change = bias.delta(self.host.get_parameter("bias")).to(y.dtype) * weight
        return y + change.view(-1, *(1,) * self.dims_after_bias(y))

    def dims_after_bias(self, y: Tensor) -> int:
        """How many dimensions of the output follow the channels: the spatial ones of a convolution or its norm."""
        return y.dim() - 2 if isinstance(self.host, _CHANNELS_SECOND) else 0

    def add_by_row(self, y: Tensor, x: Tensor, route: Route) -> Tensor:
        """y plus each row's own adapter's change: one pass for each adapter over its rows."""
        if route.lengths is not None:
            return self.add_by_segment(y, x, route)
        for name, rows in self.rows(x, route).items():
            if name is not None and (name in self.slots or name in self.biases):
                part = self.add(y.index_select(0, rows), x.index_select(0, rows), name, 1.0)
                y = y.index_copy(0, rows, part)
        return y

    def add_by_segment(self, y: Tensor, x: Tensor, route: Route) -> Tensor:
        """y (1, T, ...) plus the change of each segment of the T tokens; for layers that see one token at a time."""
        self.check_tokens(y)
        parts = []
        for name, start, stop in route.segments(y.shape, self.site):
            part = y[:, start:stop]
            parts.append(part if name is None else self.add(part, x[:, start:stop], name, 1.0))
        return torch.cat(parts, 1)

    def check_tokens(self, y: Tensor) -> None:
        """Refuse to tell tokens apart where a layer looks at several, or has them in another place than the second."""
        if not self.token_by_token or self.rows_are != "first" or y.dim() != 3 or y.shape[0] != 1:
            raise RoutingError(Fault(f"routing at site '{self.site}'", f"an output of shape {tuple(y.shape)}",
                                     "one packed row of a layer that treats each token by itself",
                                     "Give each adapter its own rows, or its own batch"))

    def rows(self, x: Tensor, route: Route) -> dict[str | None, Tensor]:
        """Rows of x by adapter, refusing inputs whose rows cannot be told apart."""
        self.check_rows(x)
        return route.rows(x.shape[0], self.site, x.device)

    def check_rows(self, x: Tensor) -> None:
        """Refuse an input whose first dimension is not made of rows in their order."""
        if self.rows_are == "second" or (self.rows_are == "gathered" and x.dim() < 3):
            got = {"second": "has rows in the second dimension", "gathered": "stands inside a list of experts"}
            raise RoutingError(Fault(
                f"routing at site '{self.site}'", f"an input of shape {tuple(x.shape)} {got[self.rows_are]}",
                "rows in the first dimension", "Run these adapters in separate batches"))


_CHANNELS_SECOND = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm,
                    nn.modules.instancenorm._InstanceNorm)


def quoted(adapter: str) -> str:
    """An adapter's name as part of a submodule's: dots are not allowed there, and a colon has a meaning in `_key`."""
    return adapter.replace("%", "%25").replace(":", "%3A").replace(".", "%2E")


def _key(parameter: str, adapter: str) -> str:
    """A submodule's name for a slot; the colon keeps it apart from every attribute of the layer."""
    return f"{quoted(parameter)}:{quoted(adapter)}"


def parameter_owner(host: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds the parameter at `path` below `host`, and the parameter's own name."""
    owner, _, leaf = path.rpartition(".")
    return host.get_submodule(owner) if owner else host, leaf


def replace_parameter(host: nn.Module, path: str, tensor: Tensor) -> Tensor:
    """Put `tensor` where the host's parameter is, and return what was there; ties to other modules are left alone."""
    owner, leaf = parameter_owner(host, path)
    before = owner._parameters[leaf]
    assert before is not None
    owner._parameters[leaf] = tensor  # type: ignore[assignment]  # a plain tensor stands in during a forward
    return before


def floating(parameter: Tensor) -> bool:
    """Whether a weight holds plain numbers, and not packed or integer codes."""
    return parameter.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64) and not wrapped(parameter)
