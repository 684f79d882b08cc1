"""Factors that start from the base's weights: PiSSA and LoftQ, over plain and over packed layers.

    plain layer, PiSSA     W stays. The slot adds s·(BA - B₀A₀), which is 0 at the start.
    packed layer           The slot adds s·BA, and while the adapter is on, the layer computes with a packed weight of
                           the adapter's own: LoftQ's Q, or PiSSA's packed rest. The base's is put aside, to the bit.

Either way the stored change is s·(BA - B₀A₀), to the weight as it was before anything was packed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltaw.bases.original import Originals, needed
from deltaw.bases.packed import Packed, is_packed, live, pack, read_packed
from deltaw.core import LoraConfig
from deltaw.core.config import LOFTQ_BITS, LOFTQ_ITER
from deltaw.core.layers import LowRank, floating
from deltaw.core.methods import lora, pissa
from deltaw.errors import BaseModelError, ConfigError, Fault
from deltaw.inject import Hosts, Target


@dataclass(frozen=True, slots=True)
class Start:
    """A new slot, and the packed weight that its layer computes with while it is on."""

    slot: LowRank
    own_weight: nn.Parameter | None = None


def check(config: LoraConfig, targets: list[Target], hosts: Hosts, original: Originals | None) -> None:
    """Raise with all that keeps this initialisation from being worked out."""
    faults: list[Fault] = []
    without: list[str] = []
    for target in (t for t in targets if t.rank):
        name, base = _weight(target, hosts)
        if is_packed(base):
            without += [name] * (original is None)
        elif config.init_lora_weights == "loftq":
            faults.append(Fault(f"site '{target.site.name}'", "is not quantized, and LoftQ makes up for quantization",
                                "a packed weight", 'Use "pissa", or quantize the base'))
        elif not floating(base) or base.is_meta:
            faults.append(Fault(f"site '{target.site.name}'", f"holds {base.dtype} on {base.device}", "values to start "
                                "from"))
    if without:
        faults.append(needed(without))
    if faults:
        raise ConfigError(*faults)


def start(config: LoraConfig, target: Target, hosts: Hosts, dtype: torch.dtype, generator: torch.Generator | None,
          original: Originals | None) -> Start:
    """A slot for one target."""
    name, base = _weight(target, hosts)
    host = hosts.model.get_submodule(target.site.host)
    packed = read_packed(host, base)
    if packed is None:
        A, B = _principal(config, target, base, generator)
        rest = None
    else:
        assert original is not None
        W = original(name, packed.packing.shape)
        if W is None:
            raise BaseModelError(Fault(f"original weight '{name}'", "is missing or has another shape",
                                       f"values of shape {packed.packing.shape}", "Give the model that was quantized"))
        rest, A, B = _over_packed(config, target, packed, W.to(base.device), generator)
    A, B = A.to(device=base.device, dtype=dtype), B.to(device=base.device, dtype=dtype)
    slot = LowRank(target.site.geometry, A, B, scaling=target.scaling, dropout=config.lora_dropout,
                   start=(A.clone(), B.clone()), rest_in_base=rest is not None)
    return Start(slot, None if rest is None else live(rest, host))


def _principal(config: LoraConfig, target: Target, W: Tensor,
               generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    return pissa.principal(W, target.site.geometry, target.rank, target.scaling, iterations=config.pissa_iterations,
                           generator=generator)


def _over_packed(config: LoraConfig, target: Target, packed: Packed, W: Tensor,
                 generator: torch.Generator | None) -> tuple[Packed, Tensor, Tensor]:
    """The adapter's own packed weight, A and B, for the weight W that the base's was packed from."""
    bits = config.loftq_config.get(LOFTQ_BITS)
    own = 8 if packed.packing.kind == "int8" else 4
    if bits not in (None, own):
        raise ConfigError(Fault("LoraConfig.loftq_config", f"got loftq_bits {bits} for a base in {own} bits", f"{own}"))
    geometry, rank, scale = target.site.geometry, target.rank, target.scaling
    if config.init_lora_weights == "loftq":
        return pissa.loftq(W, geometry, rank, scale, lambda values: pack(values, packed.packing),
                           iterations=config.loftq_config.get(LOFTQ_ITER, 1))
    A, B = _principal(config, target, W, generator)
    return pack(W.float() - lora.delta_weight(A, B, scale, geometry), packed.packing), A, B


def _weight(target: Target, hosts: Hosts) -> tuple[str, Tensor]:
    """The name and value of the parameter that a target changes."""
    site = target.site
    name = f"{site.host}.{site.parameter}" if site.host else site.parameter
    return name, hosts.model.get_submodule(site.host).get_parameter(site.parameter)
