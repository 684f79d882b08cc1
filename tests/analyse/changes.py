"""Adapters of random factors at sites of a small model, and their ΔW as dense float64 matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from deltaw.core import Adapter, Geometry, LoraConfig, SiteDelta

SITES = tuple(f"model.layers.{layer}.self_attn.{kind}" for layer in range(3) for kind in ("q_proj", "v_proj"))
OUT, IN = 24, 40


def adapter(rank: int, seed: int = 0, sites: tuple[str, ...] = SITES, shape: tuple[int, int] = (OUT, IN)) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for site in sites:
        A = torch.randn(rank, shape[1], generator=generator)
        B = torch.randn(shape[0], rank, generator=generator) * torch.linspace(1, 0.1, rank)
        made[site] = SiteDelta(Geometry(kind="linear", shape=shape), {"lora_A": A, "lora_B": B})
    return Adapter(LoraConfig(r=rank, lora_alpha=4, target_modules=["q_proj", "v_proj"]), made, {"base_model": "a/b"})


def dense(value: Adapter, site: str) -> Tensor:
    """s·BA in float64, from the tensors alone."""
    delta = value.sites[site]
    return value.scaling(site) * delta.tensors["lora_B"].double() @ delta.tensors["lora_A"].double()


def dense_phi(U: Tensor, V: Tensor, i: int, j: int) -> float:
    """Eq. 4 as it is written."""
    return float((U[:, :i].t() @ V[:, :j]).norm() ** 2) / min(i, j)
