"""`Adapter`: a low-rank change as a value: its config and its tensors by site, with no model present.

Storage, conversion, algebra, analysis and merging on disk are plain functions of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaw.core.config import LoraConfig
from deltaw.core.geometry import Geometry
from deltaw.core.methods import lora


@dataclass(frozen=True, eq=False)
class SiteDelta:
    """The change at one site: `lora_A` and `lora_B`, or one `bias`, or a saved module's whole state."""

    geometry: Geometry
    tensors: Mapping[str, Tensor]

    @property
    def A(self) -> Tensor:
        """The factor that reads the input; shape in `Geometry`."""
        return self.tensors["lora_A"]

    @property
    def B(self) -> Tensor:
        """The factor that writes the output; shape in `Geometry`."""
        return self.tensors["lora_B"]

    @property
    def is_low_rank(self) -> bool:
        """Whether this is a pair of factors, and not a bias or a saved module."""
        return self.geometry.kind not in ("bias", "saved")

    @property
    def rank(self) -> int:
        """The rank of the factors."""
        return self.geometry.rank_of(self.A, self.B)

    def delta(self, scaling: float) -> Tensor:
        """ΔW = s·BA in the base weight's own layout, at least float32."""
        return lora.delta_weight(self.A, self.B, scaling, self.geometry)


@dataclass(frozen=True, eq=False)
class Adapter:
    """A config and the tensors of each site it changes.

    Site names are the base's own dotted names: a module's for a linear, embedding or convolution, a parameter's for
    biases and stacked experts, and `<attention>.in_proj` or `.out_proj` inside `nn.MultiheadAttention`. `facts` holds
    what deltaw knows beyond PEFT's files: the base's fingerprint, the chat template's hash, how it was trained.
    """

    config: LoraConfig
    sites: Mapping[str, SiteDelta]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def scaling(self, site: str) -> float:
        """s of ΔW = s·BA at a site: the config's alpha there over this site's real rank."""
        return self.config.scaling(self.sites[site].rank, site)

    def delta(self, site: str) -> Tensor:
        """ΔW at a site, in the base weight's own layout, at least float32."""
        return self.sites[site].delta(self.scaling(site))

    @property
    def num_parameters(self) -> int:
        """How many values the adapter holds."""
        return sum(t.numel() for site in self.sites.values() for t in site.tensors.values())

    def to(self, dtype: torch.dtype) -> Adapter:
        """The same adapter with tensors of this dtype."""
        sites = {name: SiteDelta(site.geometry, {k: t.to(dtype) for k, t in site.tensors.items()})
                 for name, site in self.sites.items()}
        return Adapter(self.config, sites, self.facts)

    def save(self, path: str | Path) -> None:
        """Write PEFT's folder (`adapter_config.json`, `adapter_model.safetensors`) and `deltaw.json`, atomically."""
        from deltaw import store  # core stays below store: only this convenience reaches up, when called

        store.save(self, path)
