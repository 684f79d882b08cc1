"""The repeated blocks of a transformer, and where in each the results of attention and MLP are.

Everything is found by structure: the largest list of modules of one type holds the blocks; of a block's parts with
linear layers the first is its attention and the last its MLP. Where a norm follows the residual sum inside such a part
(BERT, RoBERTa, DeBERTa, MPNet) the result is what is added there, else (Llama, GPT-2, Qwen, Gemma) it is the part's
output. The residual stream is as wide as the outermost norm of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from deltaw.errors import Fault, TargetError
from deltaw.inject.sites import is_conv1d


@dataclass(frozen=True, slots=True)
class Result:
    """Where one half of a block has computed what is added to the residual stream."""

    name: str
    """Dotted name of the module whose output, or the first of whose outputs, is added."""
    module: nn.Module
    norm: nn.Module | None = None
    """The norm of the sum, where there is one; its name is `norm_name`."""
    norm_name: str = ""


@dataclass(frozen=True, slots=True)
class Block:
    """One repeated layer."""

    name: str
    module: nn.Module
    width: int
    """Channels of the residual stream."""
    attention: Result
    mlp: Result


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that a network repeats: the members of its largest list of modules of one type."""
    return [module for _, module in named_layers(model)]


def named_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """`repeated_layers` with their dotted names."""
    lists = [(name, list(module)) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    alike = [(name, layers) for name, layers in lists if len(layers) > 1 and len(set(map(type, layers))) == 1]
    if not alike:
        return []
    name, layers = max(alike, key=lambda found: sum(p.numel() for layer in found[1] for p in layer.parameters()))
    return [(f"{name}.{number}", layer) for number, layer in enumerate(layers)]


def find_blocks(model: nn.Module) -> list[Block]:
    """The blocks of a transformer from the first to the last; `TargetError` says what is missing in another network."""
    where = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise TargetError(Fault(where, "has an encoder and a decoder", "one stack of transformer blocks"))
    layers = named_layers(model)
    if not layers:
        raise TargetError(Fault(where, "repeats no layer", "a list of transformer blocks"))
    blocks = []
    for name, layer in layers:
        parts = [(key, child) for key, child in layer.named_children() if any(map(computes, child.modules()))]
        if len(parts) < 2:
            raise TargetError(Fault(f"{where}, layer '{name}'", f"has {len(parts)} part with weight matrices",
                                    "an attention and an MLP"))
        width = _norm_width(layer) or _outputs(_last(parts[0][1])[1])
        blocks.append(Block(name, layer, width, _result(name, *parts[0], width), _result(name, *parts[-1], width)))
    return blocks


def computes(module: nn.Module) -> bool:
    """Whether a module itself holds a weight matrix: a linear layer, transformers' `Conv1D`, or stacked experts."""
    return isinstance(module, nn.Linear) or is_conv1d(module) or any(
        p is not None and p.dim() == 3 for p in module._parameters.values())


def is_norm(module: nn.Module, width: int) -> bool:
    """Whether a module is a norm over `width` channels: a vector of gains, perhaps one of shifts, and nothing else."""
    own = dict(module.named_parameters())
    return "weight" in own and set(own) <= {"weight", "bias"} and all(tuple(p.shape) == (width,) for p in own.values())


def _norm_width(layer: nn.Module) -> int:
    """The channels of the layer's outermost norm, of which those inside attention may be narrower; 0 without one.

    The order in which linear layers are declared says nothing: Phi-3's attention has its fused q, k, v last.
    """
    depths: dict[int, int] = {}
    for name, module in layer.named_modules():
        gains = module._parameters.get("weight")
        if gains is not None and gains.dim() == 1 and is_norm(module, gains.numel()):
            depths.setdefault(name.count("."), gains.numel())
    return depths[min(depths)] if depths else 0


def _result(block: str, key: str, part: nn.Module, width: int) -> Result:
    for name, owner, child in _upwards(part, _last(part)[0]):
        norms = [(leaf, module) for leaf, module in owner.named_children() if is_norm(module, width)]
        if len(norms) == 1:
            dropouts = [leaf for leaf, module in owner.named_children() if isinstance(module, nn.Dropout)]
            leaf = dropouts[0] if len(dropouts) == 1 else child
            prefix = ".".join(filter(None, (block, key, name)))
            return Result(f"{prefix}.{leaf}", owner.get_submodule(leaf), norms[0][1], f"{prefix}.{norms[0][0]}")
    return Result(f"{block}.{key}", part)


def _last(part: nn.Module) -> tuple[str, nn.Module]:
    """The last module that holds a weight matrix, with its path below `part`."""
    return [(name, module) for name, module in part.named_modules() if computes(module)][-1]


def _upwards(part: nn.Module, path: str) -> Iterator[tuple[str, nn.Module, str]]:
    """From the module at `path` below `part` upwards: each owner's name and module, and the child on the way."""
    while path:
        path, _, child = path.rpartition(".")
        yield path, part.get_submodule(path) if path else part, child


def _outputs(module: nn.Module) -> int:
    """The width of a linear layer's output; 0 for stacked experts, which no norm follows directly."""
    if isinstance(module, nn.Linear):
        return module.out_features
    return int(module.nf) if is_conv1d(module) else 0  # type: ignore[arg-type]
