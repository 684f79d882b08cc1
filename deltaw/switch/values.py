"""Between a live model and `Adapter` values: slots made from a config or a value, and values read back from slots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.bases.original import Source, open_originals
from deltaw.core import Adapter, Geometry, LoraConfig, SiteDelta
from deltaw.core.layers import LowRank, Slot, TrainedBias, floating
from deltaw.core.methods import lora
from deltaw.errors import BaseMismatchError, Fault, near
from deltaw.inject import Hosts, Site, SiteMap, Target, resolve, saved_site
from deltaw.switch import starts


@dataclass(frozen=True, slots=True)
class Placed:
    """A slot or a module's copy, and the site it is for: one step of an `add` that has been checked."""

    site: Site
    slot: Slot | None
    module: nn.Module | None = None
    own_weight: nn.Parameter | None = None
    """What the host's packed weight is replaced by while the adapter is on (LoftQ, PiSSA)."""


def fresh(config: LoraConfig, targets: list[Target], hosts: Hosts, *, dtype: torch.dtype,
          generator: torch.Generator | None, original: Source | None = None) -> list[Placed]:
    """New slots for each target, on the devices of their hosts."""
    originals = None if original is None else open_originals(original)
    if config.starts_from_weights:
        starts.check(config, targets, hosts, originals)
    steps = []
    for target in targets:
        site = target.site
        if site.kind == "saved":
            copied = hosts.pristine_copy(site.host)
            steps.append(Placed(site, None, _train(copied, dtype)))
            continue
        base = hosts.model.get_submodule(site.host).get_parameter(site.parameter)
        if site.kind == "bias":
            steps.append(Placed(site, TrainedBias(site.geometry, base.detach().to(dtype, copy=True))))
            continue
        if config.starts_from_weights:
            made = starts.start(config, target, hosts, dtype, generator, originals)
            steps.append(Placed(site, made.slot, own_weight=made.own_weight))
            continue
        shape_A, shape_B = site.geometry.factor_shapes(target.rank)
        # A generator draws on its own device; that also makes a seed mean the same wherever the base is.
        device = base.device if generator is None or base.is_meta else generator.device
        A, B = (torch.empty(shape, dtype=dtype, device=device) for shape in (shape_A, shape_B))
        lora.initialise(A, B, config.init_lora_weights, site.geometry, target.rank, generator)
        A, B = A.to(base.device), B.to(base.device)
        steps.append(Placed(site, LowRank(site.geometry, A, B, scaling=target.scaling, dropout=config.lora_dropout)))
    return steps


def from_value(adapter: Adapter, targets: list[Target], sites: SiteMap, hosts: Hosts, *, dtype: torch.dtype | None,
               trainable: bool, partial: bool) -> list[Placed]:
    """Slots with an adapter's tensors, after checking all names and shapes; nothing is initialised first."""
    return [_placed(adapter, site, delta, hosts, dtype, trainable)
            for site, delta in fitting(adapter, targets, sites, hosts, partial=partial)]


def fitting(adapter: Adapter, targets: list[Target], sites: SiteMap, hosts: Hosts, *,
            partial: bool = False) -> list[tuple[Site, SiteDelta]]:
    """What an adapter changes, each with its site in this model; BaseMismatchError lists all that does not fit."""
    expected = {target.site.name: target.site for target in targets}
    known = {**sites.weights, **sites.parameters, **expected}
    faults, pairs = [], []
    for name, delta in adapter.sites.items():
        found = known.get(name)
        if found is None:
            faults.append(Fault(f"site '{name}'", "is not in this model", "a site of the base",
                                near(name, known) or "The adapter was made for another base"))
            continue
        site, fault = _reconciled(found, delta)
        found_faults = [fault] if fault is not None else _saved_faults(site, delta, hosts)
        faults += found_faults
        if not found_faults:
            pairs.append((site, delta))
    if not partial:
        missing = [name for name in expected if name not in adapter.sites]
        faults += [Fault(f"site '{name}'", "has no tensors in the adapter", "one pair for each site its config targets",
                         "Pass partial=True if the file leaves it out on purpose") for name in missing]
    if faults:
        raise BaseMismatchError(*faults)
    return pairs


def targets_of(adapter: Adapter, model: nn.Module, sites: SiteMap) -> list[Target]:
    """What an adapter changes in this model: what its config asks for, at the ranks its tensors really have."""
    config = adapter.config
    found = {t.site.name: t for t in resolve(config, model, sites, made_before=True)}
    targets = []
    for name, target in found.items():
        rank = _rank(adapter.sites.get(name))
        targets.append(target if rank in (0, target.rank) else
                       Target(target.site, rank, target.alpha, config.scaling(rank, name)))
    known: dict[str, Site] = {**sites.weights, **sites.parameters}
    for name, delta in adapter.sites.items():
        if name not in found and delta.geometry.kind == "saved" and name in sites.modules:
            targets.append(Target(saved_site(name, sites.modules[name]), 0, 0.0, 1.0))  # PEFT matches ends of names
        elif name not in found and name in known and (rank := _rank(delta)):
            targets.append(Target(known[name], rank, config.alpha_at(name), config.scaling(rank, name)))
    return targets


def _rank(delta: SiteDelta | None) -> int:
    """The rank of a pair of factors, or 0 for what is none (and is refused later, where it should be one)."""
    if delta is None or not delta.is_low_rank or delta.tensors.keys() != {"lora_A", "lora_B"}:
        return 0
    return delta.rank if min(delta.A.dim(), delta.B.dim()) >= 2 else 0


def _placed(adapter: Adapter, site: Site, delta: SiteDelta, hosts: Hosts, dtype: torch.dtype | None,
            trainable: bool) -> Placed:
    if site.kind == "saved":
        copied = hosts.pristine_copy(site.host)
        own_state = copied.state_dict()  # a file's tensors are on the CPU, and in the dtype that they were trained in
        copied.load_state_dict({k: t.to(own_state[k].device, own_state[k].dtype, copy=True)
                                for k, t in delta.tensors.items()}, assign=True)
        return Placed(site, None, _train(copied, dtype, trainable))
    base = hosts.model.get_submodule(site.host).get_parameter(site.parameter)
    device = base.device if base.device.type != "meta" else torch.device("cpu")

    def own(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device=device, dtype=dtype or tensor.dtype, copy=True)

    if site.kind == "bias":
        return Placed(site, TrainedBias(site.geometry, own(delta.tensors["bias"]), trainable=trainable))
    slot = LowRank(site.geometry, own(delta.A), own(delta.B), scaling=adapter.config.scaling(
        site.geometry.rank_of(delta.A, delta.B), site.name), dropout=adapter.config.lora_dropout
        if not site.substituted else 0.0, trainable=trainable)
    return Placed(site, slot)


def _reconciled(site: Site, delta: SiteDelta) -> tuple[Site, Fault | None]:
    """The model's site with the adapter's slices, or the fault of a change that does not fit its weight."""
    if site.kind == "saved":
        return site, None  # checked against its host's own tensors
    geometry = site.geometry
    wanted = {"bias"} if site.kind == "bias" else {"lora_A", "lora_B"}
    if set(delta.tensors) != wanted:
        return site, Fault(f"site '{site.name}'", f"tensors {sorted(delta.tensors)}", f"{sorted(wanted)}")
    if site.kind == "bias":
        got = tuple(delta.tensors["bias"].shape)
        return site, None if got == geometry.shape else Fault(f"'{site.name}'", f"a bias of shape {got}",
                                                              f"{geometry.shape}", "It is for another base")
    if delta.geometry.slices:
        geometry = replace(geometry, slices=delta.geometry.slices)
    shapes = f"A {tuple(delta.A.shape)}, B {tuple(delta.B.shape)}"
    within = not geometry.slices or geometry.slices[-1][1] <= geometry.out_features
    dims = tuple(map(len, geometry.factor_shapes(1)))
    rank = geometry.rank_of(delta.A, delta.B) if (delta.A.dim(), delta.B.dim()) == dims else 0
    if rank < 1 or not within or not geometry.fits(delta.A, delta.B):
        shape_A, shape_B = geometry.factor_shapes(max(rank, 1))
        return site, Fault(f"site '{site.name}'", shapes, f"A {shape_A}, B {shape_B} for a weight {geometry.shape}",
                           "The adapter was made for another base")
    if site.substituted and geometry.is_dense_grouped(delta.A):
        return site, Fault(f"site '{site.name}'", "a grouped convolution with a forward of its own and an ungrouped A, "
                           "as PEFT trains it", "factors that follow the groups", "Train it with deltaw")
    return replace(site, geometry=geometry), None


def _saved_faults(site: Site, delta: SiteDelta, hosts: Hosts) -> list[Fault]:
    """What keeps a saved module's tensors from being its host's state."""
    if site.kind != "saved":
        return []
    expected = {name: tuple(tensor.shape) for name, tensor in hosts.pristine_copy(site.host).state_dict().items()}
    faults = [Fault(f"tensor '{site.name}.{name}'", "is missing", f"shape {shape}")
              for name, shape in expected.items() if name not in delta.tensors]
    for name, tensor in delta.tensors.items():
        if name not in expected:
            faults.append(Fault(f"tensor '{site.name}.{name}'", "is not in this module", "a tensor of the module",
                                near(name, expected)))
        elif tuple(tensor.shape) != expected[name]:
            faults.append(Fault(f"tensor '{site.name}.{name}'", f"has shape {tuple(tensor.shape)}", f"{expected[name]}",
                                "The adapter was made for another base"))
    return faults


def _train(module: nn.Module, dtype: torch.dtype | None, trainable: bool = True) -> nn.Module:
    for parameter in module.parameters():
        if floating(parameter):
            parameter.requires_grad_(trainable)
    return module


def read_back(name: str, hosts: Hosts, sites: Mapping[str, Site], config: LoraConfig,
              facts: Mapping[str, Any]) -> Adapter:
    """A snapshot of a live adapter as a value; its tensors are copies."""
    by_place = {(site.host, site.parameter): site for site in sites.values()}
    found: dict[str, SiteDelta] = {}
    for host, parameter, slot in hosts.slots(name):
        site = by_place[host, parameter]
        found[site.name] = SiteDelta(slot.geometry, slot.tensors())
    ordered = {site.name: found[site.name] for site in sites.values() if site.name in found}
    for host, module in hosts.copies(name):
        tensors = {k: t.detach().clone() for k, t in module.state_dict().items()}
        size = sum(p.numel() for p in module.parameters())
        ordered[host] = SiteDelta(Geometry(kind="saved", shape=(size,)), tensors)
    counted_from = any(isinstance(slot, LowRank) and slot.start_A is not None for _, _, slot in hosts.slots(name))
    return Adapter(config.as_difference() if counted_from else config, ordered, dict(facts))
