"""Adapters made by hand: one site of each kind, and what a folder of one looks like."""

from __future__ import annotations

from typing import Any

import torch

from deltaw.core import Adapter, Geometry, LoraConfig, SiteDelta


def factors(geometry: Geometry, rank: int, dtype: torch.dtype = torch.float32) -> SiteDelta:
    """Random factors of this rank."""
    a, b = geometry.factor_shapes(rank)
    return SiteDelta(geometry, {"lora_A": torch.randn(a).to(dtype), "lora_B": torch.randn(b).to(dtype)})


def linear(out: int = 6, inp: int = 4, rank: int = 2, **more: Any) -> SiteDelta:
    return factors(Geometry(kind="linear", shape=(out, inp), **more), rank)


def small(value: float | None = None, **options: Any) -> Adapter:
    """Two linear sites; all values the same, if one is given."""
    config = LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": ["q", "v"]} | options)
    sites = {f"layers.0.{name}": linear(rank=config.r) for name in ("q", "v")}
    if value is not None:
        for site in sites.values():
            for tensor in site.tensors.values():
                tensor.fill_(value)
    return Adapter(config, sites, {"base_model": "a/b", "base": {"weights": "abc"}, "steps": 3})


def dense_grouped(rank: int = 4) -> SiteDelta:
    """A convolution over two groups whose A reads all channels, as PEFT trains it."""
    geometry = Geometry(kind="conv", shape=(6, 2, 3), groups=2)
    return SiteDelta(geometry, {"lora_A": torch.randn(rank, 4, 3), "lora_B": torch.randn(6, rank // 2, 1)})


def bias(size: int = 6) -> SiteDelta:
    return SiteDelta(Geometry(kind="bias", shape=(size,)), {"bias": torch.randn(size)})


def saved() -> SiteDelta:
    """A normalisation's whole state, with a count of no dimension."""
    tensors = {"0.weight": torch.randn(3, 4), "0.bias": torch.randn(3), "1.running_mean": torch.randn(3),
               "1.num_batches_tracked": torch.tensor(7)}
    return SiteDelta(Geometry(kind="saved", shape=(19,)), tensors)


def one_of_each() -> Adapter:
    """Every kind of site in one adapter, some within each other."""
    sites = {
        "embed": factors(Geometry(kind="embedding", shape=(9, 5)), 2),
        "layers.0.q": linear(),
        "layers.0.q.bias": bias(6),
        "layers.0.qkv": linear(9, 4, 2, slices=((0, 3), (6, 9))),
        "layers.0.c_attn": linear(4, 9, 2, transposed=True, slices=((3, 6),)),
        "layers.0.conv": factors(Geometry(kind="conv", shape=(6, 4, 3, 3)), 3),
        "layers.0.grouped": factors(Geometry(kind="conv", shape=(6, 2, 3), groups=2), 3),
        "layers.0.dense": dense_grouped(),
        "layers.0.attn.in_proj": factors(Geometry(kind="attention", shape=(12, 4), slices=((0, 4), (8, 12))), 2),
        "layers.0.attn.out_proj": factors(Geometry(kind="attention", shape=(4, 4)), 2),
        "layers.0.attn.out_proj.bias": bias(4),
        "layers.1.attn.in_proj": factors(Geometry(kind="attention", shape=(12, 4)), 3),
        "layers.2.attn.out_proj": factors(Geometry(kind="attention", shape=(4, 4)), 2),
        "layers.0.experts.up": factors(Geometry(kind="parameter", shape=(3, 8, 4)), 2),
        "layers.0.experts.down": factors(Geometry(kind="parameter", shape=(3, 4, 8), transposed=True), 2),
        "layers.0.experts.gate": factors(Geometry(kind="parameter", shape=(3, 4)), 1),
        "layers.0.experts.mix": linear(4, 4),
        "layers.0.experts.mix.bias": bias(4),
        "norm.bias": bias(4),
        "head": saved(),
    }
    config = LoraConfig(
        r=2, lora_alpha=5, target_modules=["embed", "q", "qkv", "c_attn", "conv", "grouped", "dense", "attn", "mix"],
        target_parameters=["experts.up", "experts.down", "experts.gate"], bias="all", modules_to_save=["head"],
        target_slices={"qkv": "q-v", "c_attn": ((3, 6),), "in_proj": "q-v"}, alpha_pattern={"layers.0.q": 7, "gate": 1},
        rank_pattern={"conv": 3, "grouped": 3, "dense": 4, r"1\.attn\.in_proj": 3, "gate": 1}, lora_dropout=0.1)
    return Adapter(config, sites, {"base_model": "some/base", "revision": "main", "base": {"weights": "0123"},
                                   "template": None, "training": {"loss": 0.5, "steps": [1, 2]}})
