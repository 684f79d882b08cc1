"""The independent route: W + ΔW written out in float64 from an adapter's tensors, and the plain network run on it."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from deltaw import Adapter, Switchboard
from tests.device import ON_CPU


def fill(board: Switchboard, name: str, seed: int) -> None:
    """Give an adapter values that change the output a lot: factors of ΔW as large as a weight, biases off by 0.5."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in board.parameters(name).items():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            if key.endswith(("lora_A", "lora_B")):
                parameter.copy_(noise * 0.4)
            else:
                parameter.add_((noise * 0.3).to(parameter.dtype))


def change(adapter: Adapter, site: str, shape: tuple[int, ...]) -> Tensor:
    """ΔW of one site in the shape of its weight: loops and outer products of the equation, one rank at a time."""
    delta = adapter.sites[site]
    geometry = delta.geometry
    A, B = delta.A.double().cpu(), delta.B.double().cpu()
    alpha = next((v for k, v in adapter.config.alpha_pattern.items() if site.endswith(k)), adapter.config.lora_alpha)
    W = torch.zeros(shape, dtype=torch.float64)
    match geometry.kind:
        case "linear" if geometry.slices:
            rank, row = B.shape[1], 0
            view = W.t() if geometry.transposed else W
            for part, (start, stop) in enumerate(geometry.slices):
                for k in range(rank):
                    view[start:stop] += torch.outer(B[row:row + stop - start, k], A[part * rank + k])
                row += stop - start
        case "linear" | "attention":
            rank = A.shape[0]
            for k in range(rank):
                product = torch.outer(B[:, k], A[k])
                W += product.t() if geometry.transposed else product
        case "embedding":
            rank = A.shape[0]
            for k in range(rank):
                W += torch.outer(A[k], B[:, k])
        case "conv":
            rank = A.shape[0]
            for k in range(rank):
                W += torch.einsum("o,i...->oi...", B[:, k].flatten(), A[k])
        case "parameter" if W.dim() == 3:
            experts = W.shape[0]
            rank = A.shape[0] // experts
            for e in range(experts):
                for k in range(rank):
                    product = torch.outer(B[:, k * experts + e], A[e * rank + k])
                    W[e] += product.t() if geometry.transposed else product
        case "parameter":
            rank = A.shape[0]
            for k in range(rank):
                W += torch.outer(B[:, k], A[k])
        case kind:
            raise AssertionError(kind)
    return W * (alpha / rank**0.5 if adapter.config.use_rslora else alpha / rank)


def path_of(adapter: Adapter, site: str, model: nn.Module) -> str:
    """The parameter that a site stands for."""
    match adapter.sites[site].geometry.kind:
        case "attention" if site.endswith("out_proj"):
            return f"{site}.weight"
        case "attention":
            return f"{site}_weight"
        case "linear" | "embedding" | "conv":
            return f"{site}.weight"
        case _:
            return site


def dense(model: nn.Module, adapters: Iterable[tuple[Adapter, float]]) -> nn.Module:
    """A float64 copy of a plain network with the weights W + Σ w·ΔW."""
    base = copy.deepcopy(model).double()
    changed = copy.deepcopy(base)
    for adapter, weight in adapters:
        for site, delta in adapter.sites.items():
            if delta.geometry.kind == "saved":
                for name, tensor in delta.tensors.items():
                    difference = tensor.double().cpu() - base.get_submodule(site).get_parameter(name).cpu()
                    _add(changed, f"{site}.{name}", difference * weight)
            elif delta.geometry.kind == "bias":
                _add(changed, site, (delta.tensors["bias"].double().cpu() - base.get_parameter(site).cpu()) * weight)
            else:
                path = path_of(adapter, site, model)
                shape = tuple(base.get_parameter(path).shape)
                _add(changed, path, change(adapter, site, shape) * weight)
    return changed.eval()


def _add(model: nn.Module, path: str, difference: Tensor) -> None:
    """Add to one module's weight, untying it from others."""
    owner, _, leaf = path.rpartition(".")
    module = model.get_submodule(owner)
    before = module._parameters[leaf].detach()
    module._parameters[leaf] = nn.Parameter(before + difference.to(before.device))


def wide(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Floating-point tensors in float64, ids as they are."""
    return tuple(t.double() if t.is_floating_point() else t for t in tensors)


def same(got: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether two ways to the base's own output agree: to the bit on the CPU.

    On a GPU two calls of one product may be given different kernels, which add in different orders; there it is an
    error within the tolerance.
    """
    return torch.equal(got, expected) if ON_CPU else error(got, expected) <= tolerance


def error(got: Tensor, expected: Tensor) -> float:
    """The largest difference, as a part of the largest expected value."""
    assert got.shape == expected.shape
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).abs().max() / expected.abs().max())
