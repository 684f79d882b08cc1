"""Putting adapted layers on a model's modules and taking them off again."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from torch import nn

from deltaw.core.layers import CHILD, SAVED_CHILD, Adapted, AdaptedModule, Rows, Slot
from deltaw.core.state import SwitchState
from deltaw.inject.sites import Site, adapted_class


class Hosts:
    """The adapted layers of one model, made when a slot first needs one and gone when the last slot leaves."""

    def __init__(self, model: nn.Module, state: SwitchState) -> None:
        self.model, self.state = model, state
        self.adapted: dict[str, Adapted] = {}
        self.saved: dict[str, AdaptedModule] = {}

    def put(self, site: Site, adapter: str, slot: Slot) -> None:
        """Give a site a slot for an adapter."""
        self._adapted(site.host).put(site.parameter, adapter, slot)

    def keep(self, site: Site, adapter: str, module: nn.Module) -> None:
        """Give a saved module's host an adapter's copy."""
        holder = self.saved.get(site.host)
        if holder is None:
            holder = self.saved[site.host] = AdaptedModule(self.model.get_submodule(site.host), site.host, self.state)
            holder.training = holder.host.training
            holder.install()
        holder.keep(adapter, module.train(holder.training))

    def drop(self, adapter: str) -> None:
        """Take an adapter's slots and copies away, and layers that hold nothing any more."""
        for name, layer in list(self.adapted.items()):
            layer.drop(adapter)
            if not layer.parts:
                self._remove(name)
        for name, holder in list(self.saved.items()):
            holder.drop(adapter)
            if not holder.copies:
                holder.uninstall()
                del self.saved[name]

    def slots(self, adapter: str) -> Iterator[tuple[str, str, Slot]]:
        """Host, parameter path and slot of everything that an adapter holds."""
        for host, layer in self.adapted.items():
            for parameter, slots in layer.parts.items():
                if adapter in slots:
                    yield host, parameter, slots[adapter]

    def copies(self, adapter: str) -> Iterator[tuple[str, nn.Module]]:
        """Saved modules of an adapter by their host's name."""
        for host, holder in self.saved.items():
            if adapter in holder.copies:
                yield host, holder.copies[adapter]

    def pristine_copy(self, host: str) -> nn.Module:
        """A copy of a module of the base as it was before anything was attached."""
        module = self.model.get_submodule(host)
        fresh = copy.deepcopy(module, {id(self.state): self.state})
        strip(fresh)
        return fresh

    def _adapted(self, host: str) -> Adapted:
        layer = self.adapted.get(host)
        if layer is None:
            module = self.model.get_submodule(host)
            layer = adapted_class(module)(module, host, self.state, rows=_rows(self.model, host))
            layer.training = module.training
            self._below_saved(host, layer.install)
            self._guard_fast_path(host)
            self.adapted[host] = layer
        return layer

    def _remove(self, host: str) -> None:
        layer = self.adapted.pop(host)
        self._below_saved(host, layer.uninstall)

    def _below_saved(self, host: str, change: object) -> None:
        """Change what a host runs, keeping a saved copy's turn before it."""
        assert callable(change)
        holder = self.saved.get(host)
        if holder is None:
            change()
            return
        holder.uninstall()
        change()
        holder.inner = holder.host.forward
        holder.own_forward = holder.host.__dict__.get("forward")
        holder.install()

    def _guard_fast_path(self, host: str) -> None:
        """Keep torch's encoder from reading its parts' weights itself in evaluation, past their forward.

        A layer leaves its fast path when it has a hook; the encoder around it must not pack rows for that path then.
        """
        parts = host.split(".")
        for end in range(len(parts)):
            module = self.model.get_submodule(".".join(parts[:end]))
            if isinstance(module, nn.TransformerEncoderLayer) and _nothing not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_nothing)
            elif isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor:
                module.use_nested_tensor = False
                module.register_forward_pre_hook(_packs_again)


def strip(model: nn.Module) -> None:
    """Take every adapted layer off a model, whoever put it there."""
    layers = [m for m in model.modules() if isinstance(m, Adapted)]
    for layer in sorted(layers, key=lambda m: isinstance(m, AdaptedModule), reverse=True):
        if layer.host._modules.get(layer.child_name) is layer:
            layer.uninstall()
    for module in model.modules():
        hooks = module._forward_pre_hooks
        if isinstance(module, nn.TransformerEncoder) and _packs_again in hooks.values():
            module.use_nested_tensor = True
        for key in [k for k, hook in hooks.items() if hook in (_nothing, _packs_again)]:
            del hooks[key]


def _nothing(module: nn.Module, args: object) -> None:
    """A hook without effect; its presence is what counts."""


def _packs_again(module: nn.Module, args: object) -> None:
    """A hook without effect; its presence says that the encoder packed rows before."""


def _rows(model: nn.Module, host: str) -> Rows:
    """Where a module's input has its rows, as far as the modules around it tell.

    In a list inside a list stand the experts of a layer, which see tokens in an order of their own.
    """
    parts = host.split(".")
    above = [model.get_submodule(".".join(parts[:end])) for end in range(len(parts) + 1)]
    if any(isinstance(m, _SEQUENCE) and not m.self_attn.batch_first for m in above[:-1]):
        return "second"
    if isinstance(above[-1], nn.RNNBase):
        return "second"  # of its states always, and of its input unless batch_first
    return "gathered" if sum(isinstance(module, nn.ModuleList) for module in above) > 1 else "first"


_SEQUENCE = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


__all__ = ["CHILD", "SAVED_CHILD", "Hosts", "strip"]
