"""Merging with exact undo: W = W₀ + ΔW in a new tensor, the base's own tensor kept aside and put back.

Subtracting ΔW again would not give W₀ back in bf16 or fp16; keeping W₀ does, at the price of its memory while merged.
A weight tied to another module's is untied for that time only. All new weights are computed and checked before the
first one is put in place.

A weight that bitsandbytes packed is merged only when asked for: W₀ + ΔW is packed again in the same way, which can
round the change away. How much of it survived is measured, and too little is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.bases.packed import Packed, give_back, live, pack, read_packed, take_over
from deltaw.core.layers import LowRank, Slot, TrainedBias, floating, parameter_owner, replace_parameter
from deltaw.core.packed import Int8Rows, wrapped
from deltaw.core.survival import SiteChange, change_of, survival, worst
from deltaw.errors import ConfigError, Fault, StateError
from deltaw.inject import Hosts

REQUANTIZED = "requantized"
_WORST = 3


@dataclass(frozen=True, slots=True)
class Swap:
    """One weight to replace: the host, the path below it, and what to put there."""

    host: str
    parameter: str
    tensor: Tensor
    change: SiteChange | None = None
    """What packing kept, where the weight is packed."""


@dataclass(slots=True)
class Merged:
    """What a merge put aside."""

    mix: dict[str, float]
    before: dict[str, float]
    originals: list[tuple[nn.Module, str, Tensor]] = field(default_factory=list)
    layers: list[tuple[nn.Module, dict[str, Any]]] = field(default_factory=list)
    """Packed layers, with what they knew of their own weight."""


@torch.inference_mode(False)
@torch.no_grad()
def plan_merge(hosts: Hosts, mix: Mapping[str, float], rest: Mapping[str, float], *, into: str | None = None,
               least_survival: float | None = None) -> list[Swap]:
    """All merged weights of a mix, computed and checked; nothing is changed. `rest` is what stays on beside it."""
    if into == "16bit":
        raise ConfigError(Fault("merge(into='16bit')", "is not done in memory: the layers of a quantized base can "
                                "only multiply with packed weights", f"'{REQUANTIZED}'", "On disk: deltaw.merge_files("
                                "..., into='16bit'), then load the folder that it writes; or leave the adapter "
                                "unmerged, which loses nothing"))
    if into not in (None, REQUANTIZED):
        raise ConfigError(Fault("merge(into=...)", f"got {into!r}", f"'{REQUANTIZED}'",
                                "On disk there is also 16bit: deltaw.merge_files"))
    swaps: list[Swap] = []
    faults = _clashes(hosts, mix, rest)
    for host, layer in hosts.adapted.items():
        for parameter, slots in layer.changes(mix):
            base = layer.host.get_parameter(parameter)
            packed = read_packed(layer.host, base) if into == REQUANTIZED else None
            fault = None if packed else _cannot_merge(host, base, slots)
            if fault is not None:
                faults.append(fault)
                continue
            if packed is not None:
                swaps.append(_packed_swap(_path(host, parameter), host, parameter, layer.host, packed, slots, faults))
                continue
            merged = merged_weight(base, slots)
            if not _finite(merged, slots):
                faults.append(Fault(f"'{host}.{parameter}'", "the merged weight is not finite", "finite values",
                                    "The adapter is broken, or too large for this dtype"))
            swaps.append(Swap(host, parameter, merged))
    merged_already = {_path(swap.host, swap.parameter): swap.tensor for swap in swaps}
    swaps += [swap for host, holder in hosts.saved.items() for swap in _saved_swaps(host, holder.host, {
        name: (holder.copies[name], weight) for name, weight in mix.items() if name in holder.copies}, merged_already)]
    faults += _too_little([swap.change for swap in swaps if swap.change is not None], least_survival)
    if faults:
        raise StateError(*faults)
    return swaps


def _packed_swap(name: str, host: str, parameter: str, module: nn.Module, packed: Packed,
                 slots: list[tuple[Slot, float]], faults: list[Fault]) -> Swap:
    """The weight with its change, packed again as it was."""
    before = packed.values()
    wide = merged_weight(before, slots)
    if not _finite(wide, slots):
        faults.append(Fault(f"'{name}'", "the merged weight is not finite", "finite values", "The adapter is broken"))
    again = pack(wide, packed.packing)
    change = change_of(host, name, packed.packing.kind, base=before, wide=wide, stored=again.values(), packed=True)
    return Swap(host, parameter, live(again, module), change)


def _too_little(changes: list[SiteChange], least: float | None) -> list[Fault]:
    """The faults of a change of which packing left less than this share, with the places where it left least."""
    share = survival(changes)
    if share is None or least is None or share >= least:
        return []
    found = [Fault("merge()", f"only {share:.1%} of the change survives rounding to the packed weights",
                   f"at least {least:.0%}", "Keep the adapter unmerged, or merge into 16 bit on disk "
                   "(deltaw.merge_files); force=True merges nevertheless")]
    return found + [Fault(f"'{change.tensor}'", f"{change.survived:.1%} of its change survives")
                    for change in worst(changes, _WORST)]


def apply_merge(hosts: Hosts, swaps: list[Swap], merged: Merged) -> None:
    """Put the planned weights in place, keeping what they replace."""
    for swap in swaps:
        host = hosts.model.get_submodule(swap.host)
        owner, leaf = parameter_owner(host, swap.parameter)
        original = owner.get_parameter(leaf)
        if swap.change is not None:
            merged.layers.append((owner, take_over(owner, swap.tensor)))
        replace_parameter(owner, leaf, swap.tensor if swap.change is not None else
                          nn.Parameter(swap.tensor, requires_grad=False))
        merged.originals.append((owner, leaf, original))


def undo_merge(merged: Merged) -> None:
    """Put the base's own tensors back: the same objects, hence the same bits."""
    for owner, leaf, original in reversed(merged.originals):
        now = owner.get_parameter(leaf)
        if now.device != original.device:  # the model was moved while merged: the base follows, its bits stay
            original.data = original.data.to(now.device)
        replace_parameter(owner, leaf, original)
    for owner, before in merged.layers:
        give_back(owner, before)


def merged_weight(base: Tensor, slots: list[tuple[Slot, float]]) -> Tensor:
    """W₀ + Σ w·ΔW summed in float32 or wider, rounded once to the base's dtype."""
    total = base.to(torch.promote_types(base.dtype, torch.float32), copy=True)
    for slot, weight in slots:
        if isinstance(slot, LowRank) and slot.geometry.kind == "linear":
            A, B = (factor.to(total.dtype) for factor in slot.factors())
            view = total.t() if slot.geometry.transposed else total
            view.addmm_(B, A, alpha=slot.scaling * weight)
        else:
            total += slot.delta(base).to(total.dtype) * weight
    return total.to(base.dtype)


def _clashes(hosts: Hosts, mix: Mapping[str, float], rest: Mapping[str, float]) -> list[Fault]:
    """Modules and biases trained in full by an adapter that stays on, which is a difference to the base as it was."""
    faults = []
    for host, layer in hosts.adapted.items():
        for parameter, slots in layer.parts.items():
            staying = [name for name in rest if isinstance(slots.get(name), TrainedBias)]
            if staying and any(name in slots for name in mix):
                faults.append((f"{host}.{parameter}", staying[0]))
    for host, holder in hosts.saved.items():
        staying = [name for name in rest if name in holder.copies]
        inside = any(at == host or at.startswith(f"{host}.") for at, layer in hosts.adapted.items()
                     if any(True for _ in layer.changes(mix)))
        if staying and (inside or any(name in holder.copies for name in mix)):
            faults.append((host, staying[0]))
    return [Fault(f"'{place}'", f"'{name}' trained it in full and would stay on beside what is merged there",
                  "both merged, or neither", "Merge everything that is on: merge()") for place, name in faults]


def _cannot_merge(host: str, base: Tensor, slots: list[tuple[Slot, float]]) -> Fault | None:
    if wrapped(base):
        return Fault(f"'{host}'", f"its weight is quantized ({type(base).__name__})", "a floating-point weight",
                     "Keep the adapter beside it, or merge into the base as it was before quantization")
    if isinstance(base, Int8Rows):
        return Fault(f"'{host}'", "its weight is a table in 8 bits", "a weight in 16 or 32 bits",
                     "Keep the adapter beside it; or merge into the base's files, which hold plain numbers: "
                     "deltaw.merge_files; or load the base without quantize_tables")
    if not floating(base):
        return Fault(f"'{host}'", f"its weight is quantized ({base.dtype})", "a floating-point weight",
                     "Keep the adapter beside it; into='requantized' rounds the sum back to what the weight is packed "
                     "in; or merge into 16 bit on disk: deltaw.merge_files")
    if base.is_meta:
        return Fault(f"'{host}'", "its weight is on the meta device", "a loaded weight", "Load the base first")
    for slot, _ in slots:
        if isinstance(slot, LowRank) and slot.geometry.is_dense_grouped(slot.lora_A):
            return Fault(f"'{host}'", "a grouped convolution with an ungrouped A, as PEFT trains it, cannot be merged",
                         "factors that follow the groups", "Keep this adapter unmerged")
    return None


def _finite(merged: Tensor, slots: list[tuple[Slot, float]]) -> bool:
    """Whether a merged weight is finite: by its factors, and for float16, which overflows early, by its sum too."""
    if not all(bool(torch.isfinite(p).all()) for slot, _ in slots for p in slot.parameters()):
        return False
    return merged.dtype != torch.float16 or bool(torch.isfinite(merged.sum(dtype=torch.float32)))


def _saved_swaps(host: str, module: nn.Module, copies: Mapping[str, tuple[nn.Module, float]],
                 merged_already: Mapping[str, Tensor]) -> Iterator[Swap]:
    """A saved module's weights in the place of its host's; a mix adds differences, also to what is merged already."""
    if not copies:
        return
    for path, base in _own_parameters(module):
        start = merged_already.get(_path(host, path), base)
        if start is base and [weight for _, weight in copies.values()] == [1.0]:
            copied = next(iter(copies.values()))[0].get_parameter(path)
            yield Swap(host, path, copied.detach().to(base.dtype, copy=True))
            continue
        wide = torch.promote_types(base.dtype, torch.float32)
        total = start.to(wide, copy=True)
        for copied_module, weight in copies.values():
            total += (copied_module.get_parameter(path).to(wide) - base.to(wide)) * weight
        yield Swap(host, path, total.to(base.dtype))


def _path(host: str, parameter: str) -> str:
    return f"{host}.{parameter}" if host else parameter


def _own_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    from deltaw.inject.sites import base_modules

    for name, part in base_modules(module).items():
        for leaf, parameter in part._parameters.items():
            if parameter is not None:
                yield (f"{name}.{leaf}" if name else leaf), parameter


def untie_config(model: nn.Module, merged: Merged) -> None:
    """Tell a transformers model that its embedding and head are two tensors now, or saving would drop one of them."""
    originals = {id(original) for _, _, original in merged.originals}
    still_used = any(id(p) in originals for module in model.modules() for p in module._parameters.values())
    config: Any = getattr(model, "config", None)
    if still_used and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False


__all__ = ["Merged", "Swap", "apply_merge", "merged_weight", "plan_merge", "undo_merge", "untie_config"]
