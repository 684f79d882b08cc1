"""Linear layers: `nn.Linear`, its quantized kin, and transformers' `Conv1D`.

One adapter costs two small products. Under training a plain frozen layer runs with them as one fused node, together
with the layers that share its input; so does a batch whose tokens use different adapters (`core.batched`). A quantized
layer does so too: it is unpacked once, however many adapters are on. In inference a batch whose rows use different
adapters costs two batched products, over factors stacked by row, padded to the largest rank; the stack is kept until it
goes stale.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.core import native_op
from deltaw.core.banked import Entries
from deltaw.core.batched import Frozen
from deltaw.core.frozen import Projection, Stripped, frozen_linear
from deltaw.core.kernels import low_rank_linear
from deltaw.core.layers.adapted import CHILD, Adapted, floating
from deltaw.core.layers.grouped import add_grouped, grouped
from deltaw.core.layers.shared_input import Narrow, calls
from deltaw.core.layers.slots import LowRank
from deltaw.core.methods import lora
from deltaw.core.packed import packed_weight
from deltaw.core.state import Route

MAX_ROWS_PER_ADAPTER = 4
"""Above this many rows for each adapter, a pass for each adapter beats factors copied for each row."""


class AdaptedLinear(Adapted):
    """h = W₀x + s·B(Ax) on (..., I) → (..., O)."""

    token_by_token = True

    bank: tuple[object, Tensor, Tensor] | None = None

    followers: tuple[AdaptedLinear, ...] = ()
    """Layers that are called after this one with its input; see `shared_input`."""

    entries: Entries | None = None
    """What the kernel reads of adapters in banks, here and in the layers that follow."""

    narrow: Narrow | None = None
    """What this layer and all others of its input share while a compiler traces them."""

    place: int = 0
    """This layer's place among them."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The host's output plus what is on; fused where that is known to give the same."""
        if torch.compiler.is_compiling():
            return self.traced(*args, **kwargs)
        if calls.watcher is not None and args and isinstance(args[0], Tensor):
            calls.watcher(self, args[0])
        if len(args) == 1 and not kwargs and self.is_grouped() and self.can_group(args[0]):
            return grouped(self, args[0])
        if len(args) != 1 or kwargs or not self.can_fuse(args[0]):
            return super().forward(*args, **kwargs)
        x: Tensor = args[0]
        (name, weight), = self.active().items()
        slot = self.slots[name]
        if slot.dropout and self.training:
            return low_rank_linear(x, [self.projection(name, weight, x)], slot.dropout)[0]

        def compute(layers: Sequence[AdaptedLinear]) -> Sequence[Tensor]:
            return low_rank_linear(x, [layer.projection(name, weight, x) for layer in layers])

        followers = [layer for layer in self.followers if layer.can_follow(x, name)]
        return calls.take(self, x, (name, weight), followers, compute)

    def host_output(self, *args: Any, **kwargs: Any) -> Any:
        """The host's own forward; a quantized host's product is unpacked in the shared memory while something is on."""
        if len(args) == 1 and not kwargs and not torch.compiler.is_compiling() and self.active():
            stripped = self.stripped(args[0])
            if stripped is not None:
                return frozen_linear(args[0], stripped, self._bias(args[0].dtype))
        return self.inner(*args, **kwargs)

    def stripped(self, x: Any, *, training: bool | None = None) -> Stripped | None:
        """The host's quantized weight, where a product with x through it is what the host itself would compute.

        With `training` as if the host were in that mode.
        """
        training = self.host.training if training is None else training
        weight = self.host._parameters.get("weight")
        if weight is None or floating(weight) or self.own_forward is not None or type(x) is not Tensor \
                or not x.numel() or not floating(x) or weight.device != x.device or lora.autocasts(x) or _transformed():
            return None
        packed = packed_weight(self.host)
        if packed is None or getattr(self.host, "compute_dtype", None) not in (None, x.dtype):
            return None
        # bitsandbytes rounds the activations to 8 bits as well, except under training on the CPU.
        if packed.kind == "int8" and not (training and x.device.type == "cpu"):
            return None
        return Stripped(packed, self.state.workspace)

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        bias = self.host._parameters.get("bias")
        return None if bias is None else bias.to(dtype)

    def active(self) -> dict[str, float]:
        """The adapters that are on here for every row, with their weights."""
        route = self.state.route
        mix = self.state.mix if route is None else dict.fromkeys(route.unique, 1.0)
        return {name: weight for name, weight in mix.items() if name in self.slots or name in self.biases}

    def traced(self, *args: Any, **kwargs: Any) -> Any:
        """Plain operations, for a compiler; the narrow products of layers that share x are one, or the layers are."""
        active, narrow = self.active(), self.narrow
        if len(args) == 1 and not kwargs and (y := self.traced_as_one(args[0])) is not None:
            return y
        if narrow is None or len(args) != 1 or kwargs or len(active) != 1 or lora.autocasts(args[0]) \
                or self.state.compute_dtype is not None or (self.state.route and not self.state.route.is_uniform):
            return super().forward(*args, **kwargs)
        (name, weight), = active.items()
        if not all(layer.is_low_rank_only(name) for layer in narrow.layers):
            return super().forward(*args, **kwargs)
        slot, h = self.slots[name], narrow.of(self.place, args[0], name)
        return lora.add_widened(self.inner(args[0]), h, slot.factors()[1], slot.scaling * weight)

    def traced_as_one(self, x: Tensor) -> Tensor | None:
        """The output where one operation computes this layer and those that share x; None where it does not."""
        if len(self.active()) != 1 or not self.can_fuse(x):
            return None
        (name, weight), = self.active().items()

        def projections(layers: Sequence[AdaptedLinear]) -> list[Projection]:
            return [layer.projection(name, weight, x) for layer in layers]

        layers = (self,) if self.narrow is None else self.narrow.layers
        if not all(layer.is_low_rank_only(name) and layer.can_fuse(x) for layer in layers) \
                or not native_op.is_for(x, projections(layers)):
            return None
        if self.narrow is None:
            return native_op.low_rank_linear(x, projections([self]))[0]
        return self.narrow.taken(self.place, x, lambda some: native_op.low_rank_linear(x, projections(some)))

    def is_low_rank_only(self, name: str) -> bool:
        """Whether an adapter changes this layer by B(A x) and nothing else, with no dropout now."""
        slot = self.slots.get(name)
        return slot is not None and name not in self.biases and not (slot.dropout and self.training)

    def can_fuse(self, x: Any) -> bool:
        """Whether this call is training of one adapter over a plain frozen layer, with nothing that looks inside."""
        return torch.is_grad_enabled() and type(x) is Tensor and bool(x.numel()) and not self.obstacle(x)

    def obstacle(self, x: Tensor, *, training: bool | None = None) -> str:
        """What keeps training on x from being one fused node, in a few words; "" where nothing does.

        With `training` as if the host were in that mode.
        """
        bias = self.host._parameters.get("bias")
        if self.is_grouped():
            return "rows of several adapters in a batch"
        if self.state.compute_dtype not in (None, x.dtype):
            return f"low-rank products in {_name(self.state.compute_dtype)} on a {_name(x.dtype)} input"
        if bias is not None and bias.requires_grad:
            return "the base's weight or bias is trained too"
        active = self.active()
        if self.biases.keys() & active.keys():
            return "a trained bias"
        if len(active) != 1:
            return f"{len(active)} adapters at once"
        return "" if self.stripped(x, training=training) is not None else self._obstacle_of_host(x)

    def _obstacle_of_host(self, x: Tensor) -> str:
        """What makes the host something else than a product with an unquantized frozen weight of x's dtype."""
        host, weight, bias = self.host, self.host._parameters["weight"], self.host._parameters.get("bias")
        if not self._is_plain or type(weight) is not nn.Parameter:
            return f"{type(host).__name__} multiplies in a way of its own"
        if lora.autocasts(x):
            return "autocast"
        if weight.requires_grad:
            return "the base's weight or bias is trained too"
        if weight.dtype != x.dtype or not floating(x) or (bias is not None and bias.dtype != x.dtype):
            return f"{_name(weight.dtype)} weights on a {_name(x.dtype)} input"
        if weight.device != x.device:
            return "weight and input are on two devices"
        return "a transform of torch.func" if _transformed() else ""

    def is_grouped(self) -> bool:
        """Whether rows or tokens of one batch use different adapters."""
        return self.state.route is not None and not self.state.route.is_uniform

    def can_group(self, x: Any) -> bool:
        """Whether tokens with adapters of their own can be computed here in one node; rows in inference need not."""
        route = self.state.route
        assert route is not None
        # Training with reentrant checkpointing has no gradients in its forward, and must do the same in its second.
        if self.rows_are != "first" or (route.lengths is None and not torch.is_grad_enabled() and not self.training):
            return False
        return self.is_frozen_product(x) and not any(name in self.biases for name in route.unique)

    def is_frozen_product(self, x: Any) -> bool:
        """Whether the host only multiplies x with a frozen weight, plain or packed, and nothing looks inside."""
        bias = self.host._parameters.get("bias")
        if type(x) is not Tensor or not x.numel() or self.state.compute_dtype not in (None, x.dtype) \
                or (bias is not None and bias.requires_grad):
            return False
        return self.stripped(x) is not None or not self._obstacle_of_host(x)

    def frozen(self, x: Tensor) -> Frozen:
        """The host's own product with x."""
        W = self.stripped(x) or self.weight_OI()
        return Frozen(W, self._bias(x.dtype), W.shape[0])

    def weight_OI(self) -> Tensor:
        """The host's weight, outputs first."""
        W = self.host.get_parameter("weight")
        return W.t() if next(iter(self.slots.values())).geometry.transposed else W

    def can_follow(self, x: Tensor, name: str) -> bool:
        """Whether this layer's output may be made before it is called: no hook of its host would notice."""
        return (self.is_low_rank_only(name) and self.is_unwatched() and self.can_fuse(x)
                and self.in_features == x.shape[-1])

    def is_unwatched(self) -> bool:
        """Whether the host's forward is this layer's, and no hook sees its input first."""
        host = self.host
        return (host._modules.get(CHILD) is self and host.__dict__.get("forward") == self.forward
                and not host._forward_pre_hooks)

    def projection(self, name: str, weight: float, x: Tensor) -> Projection:
        """The layer and one adapter's change as the fused product with x takes them."""
        slot = self.slots[name]
        return Projection(self.stripped(x) or self.weight_OI(), self._bias(x.dtype), *slot.factors(),
                          slot.scaling * weight)

    @property
    def in_features(self) -> int:
        """I, of the host."""
        return next(iter(self.slots.values())).geometry.in_features

    @property
    def _is_plain(self) -> bool:
        """Whether the host runs the forward of its class, and that is a product with its weight and nothing else."""
        loaded = sys.modules.get("transformers.pytorch_utils")  # not imported: then the host is no Conv1D
        plain = (nn.Linear.forward, None if loaded is None else loaded.Conv1D.forward)
        return self.own_forward is None and type(self.host).forward in plain

    def drop(self, adapter: str) -> None:
        """Forget one adapter's slots, and the stack: the next one's factors may come to lie at the same addresses."""
        super().drop(adapter)
        self.bank = self.entries = None

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
        if route.lengths is not None and self.rows_are == "first" and not self.biases.keys() & set(route.unique):
            return add_grouped(self, y, x, route)
        unique = [name for name in route.unique if name in self.slots]
        dropout = self.training and any(self.slots[name].dropout for name in unique)
        if dropout or any(name in self.biases for name in route.unique) \
                or len(route.names) > MAX_ROWS_PER_ADAPTER * len(unique):
            return super().add_by_row(y, x, route)
        self.rows(x, route)
        dtype = x.dtype if self.state.compute_dtype is None else self.state.compute_dtype
        A_BRI, B_BRO = self.stacked(route, unique, dtype)
        rows = len(route.names)
        out = lora.add_low_rank_by_row(y.reshape(rows, -1, y.shape[-1]),
                                       x.to(dtype).reshape(rows, -1, x.shape[-1]), A_BRI, B_BRO)
        return out.view(y.shape)

    def stacked(self, route: Route, unique: list[str], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (B, R, I) and s·Bᵀ (B, R, O) for the rows of a route, with zeros for rows that change nothing here."""
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
        B_NRO = torch.stack([F.pad((B * self.slots[name].scaling).to(dtype).t(), (0, 0, 0, width - B.shape[1]))
                             for name, (_, B) in zip(unique, factors, strict=True)])
        if tuple(unique) == route.names:
            return A_NRI, B_NRO
        position = {name: i for i, name in enumerate(unique)}
        index = torch.tensor([position.get(name, 0) if name is not None else 0 for name in route.names],
                             device=A_NRI.device)
        on = torch.tensor([name in position for name in route.names], device=A_NRI.device, dtype=dtype)
        return A_NRI.index_select(0, index), B_NRO.index_select(0, index) * on.view(-1, 1, 1)


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, which know nothing of the fused node."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
