"""`Site`: one place in the base where a change may go; `find_sites` lists those of a model, by its modules' types."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import nn

from deltaw.core.geometry import Geometry, Kind
from deltaw.core.layers import (
    CHILD,
    SAVED_CHILD,
    Adapted,
    AdaptedAttention,
    AdaptedConv,
    AdaptedEmbedding,
    AdaptedLinear,
    AdaptedParameters,
)
from deltaw.errors import Fault, TargetError


@dataclass(frozen=True, slots=True)
class Site:
    """A weight that can change: `name` as the user sees it, the module that hosts it, and its path below the host."""

    name: str
    host: str
    parameter: str
    geometry: Geometry
    substituted: bool = False
    """The host runs with W₀ + ΔW in the weight's place, for what it does with the weight is its own affair."""

    @property
    def kind(self) -> Kind:
        """What sort of weight it is."""
        return self.geometry.kind


@dataclass(frozen=True, slots=True)
class SiteMap:
    """All sites of a model."""

    weights: dict[str, Site]
    """Modules whose weight can change, by module name; attention's projections as `<module>.in_proj`, `.out_proj`."""
    parameters: dict[str, Site]
    """Every other 2-D or 3-D parameter, by its own name."""
    modules: dict[str, nn.Module]
    """All modules of the base by name, without what deltaw put there."""


def find_sites(model: nn.Module) -> SiteMap:
    """Every place in `model` where a change may go; no weight is read, so the meta device will do."""
    modules = base_modules(model)
    weights: dict[str, Site] = {}
    parameters: dict[str, Site] = {}
    attention = [name for name, module in modules.items() if isinstance(module, nn.MultiheadAttention)]
    for name, module in modules.items():
        if isinstance(module, nn.MultiheadAttention):
            weights |= {site.name: site for site in _attention_sites(name, module)}
        elif name.rpartition(".")[0] in attention and name.endswith("out_proj"):
            continue  # its forward is never called: the attention hosts it
        elif (geometry := _geometry(module)) is not None:
            weights[name] = Site(name, name, "weight", geometry, substituted=_convolves_its_way(module))
        else:
            parameters |= {site.name: site for site in _parameter_sites(name, module)}
    return SiteMap(weights, parameters, modules)


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The model's modules by name, each once, leaving out deltaw's own."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def walk(module: nn.Module, name: str) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        found[name] = module
        for key, child in module._modules.items():
            if key in (CHILD, SAVED_CHILD) and not isinstance(child, Adapted):
                raise TargetError(Fault(f"module '{name}'", f"has a part named '{key}' of its own",
                                        "that name to be free for deltaw's parts", "Rename it"))
            if child is not None and not isinstance(child, Adapted):
                walk(child, f"{name}.{key}" if name else key)

    walk(model, "")
    return found


def adapted_class(host: nn.Module) -> type[Adapted]:
    """The layer class for a host, whichever of its parameters change."""
    if isinstance(host, nn.MultiheadAttention):
        return AdaptedAttention
    match _geometry(host):
        case Geometry(kind="linear"):
            return AdaptedLinear
        case Geometry(kind="embedding"):
            return AdaptedEmbedding
        case Geometry(kind="conv"):
            return AdaptedParameters if _convolves_its_way(host) else AdaptedConv
        case _:
            return Adapted if isinstance(host, _NORMS) else AdaptedParameters


_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
"""Layers that add their bias last, so that a trained one is added after them."""


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' `Conv1D`, a linear layer with its weight stored inputs first."""
    loaded = sys.modules.get("transformers.pytorch_utils")  # not imported: then no module can be one
    return loaded is not None and isinstance(module, loaded.Conv1D)


def _geometry(module: nn.Module) -> Geometry | None:
    if module._parameters.get("weight") is None:
        return None  # computed at each use, as under torch's parametrizations: there is no tensor to stand for
    if isinstance(module, nn.Linear):
        return Geometry(kind="linear", shape=(module.out_features, module.in_features))
    if is_conv1d(module):
        return Geometry(kind="linear", shape=_shape(module.weight), transposed=True)
    if isinstance(module, nn.Embedding):
        scaled = type(module).forward is not nn.Embedding.forward
        if scaled and not isinstance(getattr(module, "embed_scale", None), (torch.Tensor, float, int)):
            return None
        return Geometry(kind="embedding", shape=_shape(module.weight))
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return Geometry(kind="conv", shape=_shape(module.weight), groups=module.groups)
    return None


def _convolves_its_way(module: nn.Module) -> bool:
    """Whether this convolution pads its input or scales its weight in a forward of its own, which A's would not."""
    plain = next((c for c in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(module, c)), None)
    return plain is not None and type(module).forward is not plain.forward


def _attention_sites(name: str, module: nn.MultiheadAttention) -> list[Site]:
    prefix = f"{name}." if name else ""
    paths = {"in_proj": "in_proj_weight"} if module.in_proj_weight is not None else {
        "q_proj": "q_proj_weight", "k_proj": "k_proj_weight", "v_proj": "v_proj_weight"}
    paths["out_proj"] = "out_proj.weight"
    return [Site(f"{prefix}{short}", name, path, Geometry(kind="attention", shape=_shape(module.get_parameter(path))),
                 substituted=True) for short, path in paths.items()]


def _parameter_sites(name: str, module: nn.Module) -> list[Site]:
    container = isinstance(module, (nn.ParameterList, nn.ParameterDict))  # never run: what holds it is
    host, _, held = name.rpartition(".") if container else (name, "", "")
    transposed = bool(getattr(module, "is_transposed", False))  # transformers' mark of experts stored inputs first
    sites = []
    for leaf, parameter in module._parameters.items():
        if parameter is not None and parameter.dim() in (2, 3):
            geometry = Geometry(kind="parameter", shape=_shape(parameter),
                                transposed=transposed and parameter.dim() == 3)
            sites.append(Site(f"{name}.{leaf}" if name else leaf, host, f"{held}.{leaf}" if held else leaf, geometry,
                              substituted=True))
    return sites


def _shape(weight: object) -> tuple[int, ...]:
    assert isinstance(weight, torch.Tensor)
    return tuple(weight.shape)
