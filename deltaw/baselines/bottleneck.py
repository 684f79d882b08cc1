"""Adapters: a bottleneck of two linear layers and a non-linearity between, f(x) = U·σ(D·x + b_D) + b_U.

    adapter-h   Houlsby et al. 2019    h ← h + f(h)            h is what attention, and what the MLP, adds to the stream
    adapter-l   Lin et al. 2020        y ← y + f(LN(y))        y is the block's output, LN a new norm
    adapter-p   Pfeiffer et al. 2021   s ← s + f(LN(s))        s is the sum after the MLP, LN the block's own norm of it
    adapter-d   Rücklé et al. 2020     as adapter-p, without the first layers (AdapterDrop)

A block that norms before its MLP (GPT-2, Llama) has no norm of s, and adapter-p is then y ← y + f(y). Weights begin as
N(0, 0.01²) cut at two deviations (Houlsby et al.), so that the network begins close to the base.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.baselines.part import Hooked
from deltaw.inject.blocks import Block

CHILD = "deltaw_bottleneck"
DEVIATION = 0.01
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


class Bottleneck(nn.Module):
    """f of the module's text, kept in float32 and computed in the activation's dtype."""

    def __init__(self, width: int, rank: int, activation: str, *, norm: bool, device: torch.device,
                 generator: torch.Generator | None) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": torch.float32}
        self.act = ACTIVATIONS[activation]
        self.norm = nn.LayerNorm(width, **made) if norm else None
        self.down = nn.Linear(width, rank, **made)
        self.up = nn.Linear(rank, width, **made)
        with torch.no_grad():
            for linear in (self.down, self.up):
                linear.bias.zero_()
                linear.weight.copy_(_truncated_normal(linear.weight, generator))

    def forward(self, x: Tensor) -> Tensor:
        """f(x), of x's shape and dtype."""
        n = x if self.norm is None else _normed(x, self.norm)
        return _linear(self.act(_linear(n, self.down)), self.up)


class Bottlenecks(Hooked):
    """One kind of adapter on some blocks."""

    def __init__(self, form: str, blocks: Sequence[Block], *, width: int, rank: int, activation: str,
                 device: torch.device, seed: int) -> None:
        super().__init__()
        self.kind = f"adapter-{form}"
        self.width, self.rank, self.activation, self.device = width, rank, activation, device
        self.form = form
        self.generator = torch.Generator().manual_seed(seed)
        self.bottlenecks: dict[str, Bottleneck] = {}
        for block in blocks:
            match form:
                case "h":
                    self._add_to_output(block.attention.name, block.attention.module)
                    self._add_to_output(block.mlp.name, block.mlp.module)
                case "p" if block.mlp.norm is not None:
                    self._before_norm(block.mlp.norm_name, block.mlp.norm)
                case _:
                    self._add_to_output(block.name, block.module)

    def parameters(self) -> dict[str, nn.Parameter]:
        """"<place>.down.weight" and so on."""
        return {f"{site}.{name}": parameter for site, module in self.bottlenecks.items()
                for name, parameter in module.named_parameters()}

    def _add_to_output(self, name: str, module: nn.Module) -> None:
        """y ← y + f(y); the f of adapter-l begins with a norm."""
        f = self._new(name, module)

        def add(_: nn.Module, __: Any, output: Any) -> Any:
            if not self.on:
                return None
            if isinstance(output, Tensor):
                return output + f(output)
            return (output[0] + f(output[0]), *output[1:])

        self.handles.append(module.register_forward_hook(add))

    def _before_norm(self, name: str, norm: nn.Module) -> None:
        """LN(s) ← LN(s + f(LN(s)))."""
        f = self._new(name, norm)

        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Any:
            return module.forward(args[0] + f(output)) if self.on else None

        self.handles.append(norm.register_forward_hook(add))

    def _new(self, name: str, owner: nn.Module) -> Bottleneck:
        made = Bottleneck(self.width, self.rank, self.activation, norm=self.form == "l", device=self.device,
                          generator=self.generator)
        self.keep(owner, CHILD, made)
        self.bottlenecks[f"{name}.{CHILD}"] = made
        return made


def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def _normed(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)


def _truncated_normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    if like.is_meta:
        return like
    drawn = torch.empty(like.shape)
    nn.init.trunc_normal_(drawn, std=DEVIATION, a=-2 * DEVIATION, b=2 * DEVIATION, generator=generator)
    return drawn.to(like.device)
