"""`Switchboard`: the one owner of what is attached to a model, what is on, and what is merged.

    board = deltaw.attach(model, deltaw.LoraConfig(r=8), name="sql")
    board.add("poet", deltaw.load("adapters/poet"))
    board.use("poet")                                  # one assignment, whatever the model's size
    with board.route(["sql", None, "poet"]): ...       # each row its own
    with board.merged("sql"): ...                      # W = W₀ + BA, undone to the bit

State changes only in these calls, never in `train()`, `eval()`, `forward()` or `state_dict()`. Adding, loading or
removing an adapter never changes another one's output, trainability or tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from deltaw import bases, store
from deltaw.bases.original import Source
from deltaw.core import Adapter, LoraConfig, SiteDelta
from deltaw.core.layers import Slot, share, watching
from deltaw.core.state import Route, SwitchState
from deltaw.core.survival import LEAST_SURVIVAL, SiteChange
from deltaw.errors import BaseMismatchError, ConfigError, Fault, StateError, near
from deltaw.inject import Hosts, SiteMap, Target, find_sites, resolve
from deltaw.switch import merging, own_weights, values
from deltaw.switch.describe import describe
from deltaw.switch.frozen import Frozen


class Switchboard:
    """Made by `deltaw.attach`; see the module's text for what it does."""

    def __init__(self, model: nn.Module, *, compute_dtype: torch.dtype | None = None) -> None:
        self.model = model
        self.site_map: SiteMap = find_sites(model)
        self._state = SwitchState(compute_dtype=compute_dtype)
        self._hosts = Hosts(model, self._state)
        self._configs: dict[str, LoraConfig] = {}
        self._targets: dict[str, list[Target]] = {}
        self._facts: dict[str, dict[str, Any]] = {}
        self._merged: merging.Merged | None = None
        self._own = own_weights.OwnWeights()
        self._fingerprints: dict[tuple[str, ...], bases.Fingerprint] = {}
        self._frozen = Frozen()

    # -- which adapters there are ------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the attached adapters, in the order they came."""
        return tuple(self._configs)

    @property
    def active(self) -> dict[str, float]:
        """What is on and unmerged, with weights; empty means the base (or only what is merged)."""
        return dict(self._state.mix)

    @property
    def merged_mix(self) -> dict[str, float]:
        """What is merged into the weights."""
        return dict(self._merged.mix) if self._merged else {}

    def add(self, name: str, adapter: LoraConfig | Adapter, *, seed: int | None = None, trainable: bool | None = None,
            dtype: torch.dtype | None = torch.float32, any_base: bool = False, partial: bool = False,
            original: Source | None = None) -> list[Target]:
        """Attach another adapter, without switching to it; returns what it changes.

        A `LoraConfig` makes new factors (trainable; `seed` for a generator of their own, else torch's default one). An
        `Adapter` brings its tensors (frozen unless `trainable`). `dtype` is that of the stored factors, None keeps an
        adapter's own; products are computed in the activation's dtype. `any_base` skips the check that an adapter was
        made for this base, `partial` allows sites of its config to be missing. `original` is the model before it was
        quantized (a folder, a Hub id or a state dict), which "pissa" and "loftq" start from over packed weights.

        Raises TargetError, BaseMismatchError, StateError (the name is taken); nothing is attached then.
        """
        self._check_new_name(name)
        config = adapter if isinstance(adapter, LoraConfig) else adapter.config
        with torch.inference_mode(False):
            if isinstance(adapter, LoraConfig):
                targets = resolve(config, self.model, self.site_map)
                generator = None if seed is None else torch.Generator().manual_seed(seed)
                if config.starts_from_weights:
                    self._check_unmerged("add")
                with self._own.off():
                    placed = values.fresh(config, targets, self._hosts, dtype=dtype or torch.float32,
                                          generator=generator, original=original)
            else:
                adapter = store.settle_parameters(adapter, self._parameter_names)
                self._check_base(adapter, any_base)
                targets = values.targets_of(adapter, self.model, self.site_map)
                placed = values.from_value(adapter, targets, self.site_map, self._hosts, dtype=dtype,
                                           trainable=bool(trainable), partial=partial)
        for step in placed:
            if step.module is not None:
                self._hosts.keep(step.site, name, step.module)
            elif step.slot is not None:
                self._hosts.put(step.site, name, step.slot)
        self._own.keep(name, [(self.model.get_submodule(step.site.host), step.site.parameter, step.own_weight)
                              for step in placed if step.own_weight is not None])
        self._configs[name], self._targets[name] = config, targets
        self._facts[name] = {} if isinstance(adapter, LoraConfig) else dict(adapter.facts)
        if trainable is not None:
            for parameter in self.parameters(name).values():
                parameter.requires_grad_(trainable)
        return targets

    def remove(self, name: str) -> None:
        """Take an adapter away; one that is merged must be unmerged first."""
        self._check_known(name)
        if self._merged is not None and name in self._merged.mix:
            raise StateError(Fault(f"remove('{name}')", "it is merged", "an unmerged adapter", "Call unmerge() first"))
        if self._state.route is not None and name in self._state.route.names:
            raise StateError(Fault(f"remove('{name}')", "rows are routed to it", "an adapter that is not routed",
                                   "Leave the route() block first"))
        self._own.drop(name)
        self._hosts.drop(name)
        for record in (self._configs, self._targets, self._facts):
            del record[name]
        self._state.mix = {n: w for n, w in self._state.mix.items() if n != name}
        if self._merged is not None:
            self._merged.before.pop(name, None)

    # -- which are on ------------------------------------------------------------------------------------------------

    def use(self, choice: str | Mapping[str, float] | None) -> None:
        """Turn on one adapter, a weighted mix (ΔW = Σ w·ΔWᵢ), or none. Takes the same time for any model."""
        self._check_unmerged("use")
        mix = {} if choice is None else {choice: 1.0} if isinstance(choice, str) else \
            {name: float(weight) for name, weight in choice.items()}
        for name in mix:
            self._check_known(name)
        self._own.wear(mix)
        self._state.mix = mix

    @contextmanager
    def off(self) -> Iterator[None]:
        """The base alone, for the length of the block."""
        self._check_unmerged("off")
        before = self._state.mix, self._state.route
        self._state.mix, self._state.route = {}, None
        try:
            with self._own.off():
                yield
        finally:
            self._state.mix, self._state.route = before

    @contextmanager
    def route(self, names: Sequence[str | None], *, lengths: Sequence[int] | None = None,
              generators: Mapping[str, torch.Generator] | None = None) -> Iterator[None]:
        """One adapter (or None, the base) for each row of the batch, in training and inference.

        Rows may be repeated in place. `lengths` counts each name's tokens in one packed row; dropout has `generators`.
        """
        self._check_unmerged("route")
        if isinstance(names, str) or not names:
            raise StateError(Fault("route()", f"got {names!r}", "one name or None for each row of the batch"))
        if lengths is not None and (len(lengths) != len(names) or min(lengths) < 0):
            raise StateError(Fault("route()", f"got lengths {list(lengths)}", f"{len(names)}, tokens for each name"))
        for name in {n for n in names if n is not None}:
            self._check_known(name)
        self._own.check_route(names)
        before = self._state.route
        self._state.route = Route(tuple(names), tuple(lengths) if lengths else None, dict(generators or {}))
        try:
            with self._own.off():
                yield
        finally:
            self._state.route = before

    # -- what is in the weights --------------------------------------------------------------------------------------

    def merge(self, name: str | None = None, *, into: Literal["requantized"] | None = None,
              least_survival: float = LEAST_SURVIVAL, force: bool = False) -> tuple[SiteChange, ...]:
        """Put ΔW into the base's weights: of everything that is on, or of one adapter.

        One of several that are on keeps its weight in the mix, and the others stay on unmerged: the output does not
        change. One that is not on is switched to first. The base's own tensors are kept for `unmerge`.

        Packed weights need `into` "requantized": what that keeps of each change is returned, too little refused.
        """
        self._check_unmerged("merge")
        if self._state.route is not None:
            raise StateError(Fault("merge()", "rows are routed to adapters", "a model that is not routed",
                                   "Leave the route() block first"))
        before = dict(self._state.mix)
        if name is None:
            mix = before
        else:
            self._check_known(name)
            mix = {name: before.get(name, 1.0)}
        if not mix:
            raise StateError(Fault("merge()", "nothing is on", "an adapter in use", "Name one, or call use() first"))
        rest = {n: w for n, w in before.items() if n not in mix} if name is None or name in before else {}
        with self._own.worn(mix | rest):
            swaps = merging.plan_merge(self._hosts, mix, rest, into=into,
                                       least_survival=None if force else least_survival)
        self._own.wear(mix | rest)
        self._merged = merging.Merged(mix, before)
        merging.apply_merge(self._hosts, swaps, self._merged)
        self._state.mix = rest
        return tuple(swap.change for swap in swaps if swap.change is not None)

    def unmerge(self) -> None:
        """Give the base its own tensors back, to the bit, and turn on what was on before `merge`."""
        if self._merged is None:
            raise StateError(Fault("unmerge()", "nothing is merged", "a merged adapter", "Call merge() first"))
        merging.undo_merge(self._merged)
        self._state.mix, self._merged = self._merged.before, None
        self._own.wear(self._state.mix)

    @contextmanager
    def merged(self, name: str | None = None, **options: Any) -> Iterator[None]:
        """`merge`, with its options, for the length of the block, then `unmerge`."""
        self.merge(name, **options)
        try:
            yield
        finally:
            self.unmerge()

    def keep_merged(self, name: str, **options: Any) -> None:
        """Merge one adapter for good, with no undo. Tied weights that now differ are untied in the model's config."""
        if self._merged is not None:
            self.unmerge()
        self.merge(name, **options)
        assert self._merged is not None
        merging.untie_config(self.model, self._merged)
        self._own.settle(self._merged.originals)
        self._merged, self._state.mix = None, {}

    # -- the base ----------------------------------------------------------------------------------------------------

    def freeze_base(self) -> None:
        """Stop gradients to all of the base's parameters, remembering which had them."""
        self._frozen.freeze(self.model, [parameter for _, parameter in self._base_parameters()])

    def thaw_base(self) -> None:
        """Let the base's parameters have gradients again where they had them before `freeze_base`."""
        self._frozen.thaw()

    def share_inputs(self, forward: Callable[[], object]) -> list[tuple[str, ...]]:
        """Watch one forward, and from now on compute linear layers that get one tensor together, under training.

        Such are q, k and v, or gate and up. Their outputs and gradients stay the same to rounding; a step is a little
        faster and keeps less. Returns the sites of each group. Call it again after adding adapters to more layers.
        """
        with torch.no_grad(), watching() as runs:
            forward()
        return [tuple(layer.site for layer in group) for group in share(runs)]

    def slots(self, name: str) -> Iterator[tuple[str, str, Slot]]:
        """Host, parameter path and slot of everything that an adapter holds."""
        self._check_known(name)
        return self._hosts.slots(name)

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The live parameters of an adapter, by site and tensor ("layers.0.q_proj.lora_A"); for an optimizer."""
        places = {(t.site.host, t.site.parameter): t.site for t in self.table(name)}
        found: dict[str, nn.Parameter] = {}
        for host, path, slot in self.slots(name):
            site = places[host, path]
            for tensor, parameter in slot.named_parameters():
                found[site.name if site.kind == "bias" else f"{site.name}.{tensor}"] = parameter
        for host, module in self._hosts.copies(name):
            found |= {f"{host}.{tensor}": parameter for tensor, parameter in module.named_parameters()}
        return found

    def adapter(self, name: str) -> Adapter:
        """A snapshot of an adapter as a value, with copies of its tensors and the base's fingerprint."""
        self._check_known(name)
        sites = {t.site.name: t.site for t in self._targets[name]}
        value = values.read_back(name, self._hosts, sites, self._configs[name], self._facts[name])
        # A head that is trained in full comes with the adapter, and the base's own is often drawn anew at each load.
        base = self.fingerprint(without=_saved(value.sites))
        return replace(value, facts={**value.facts, "base": base.to_dict()})

    def note(self, name: str, **facts: Any) -> None:
        """Record facts that travel with an adapter, such as how it was trained."""
        self._check_known(name)
        self._facts[name].update(facts)

    def table(self, name: str) -> list[Target]:
        """What an adapter changes: one entry for each site, with its kind, shape, rank and count."""
        self._check_known(name)
        return list(self._targets[name])

    def __str__(self) -> str:
        """The table of everything attached."""
        return describe(self._targets, self._state.mix)

    def fingerprint(self, *, without: tuple[str, ...] = ()) -> bases.Fingerprint:
        """What identifies the base's weights, merged or not; computed once. `without` names modules to leave out."""
        if without not in self._fingerprints:
            inside = tuple(f"{name}." for name in without)
            kept = ((n, p) for n, p in self._base_parameters() if not n.startswith(inside))
            self._fingerprints[without] = bases.fingerprint(kept)
        return self._fingerprints[without]

    # -- checks ------------------------------------------------------------------------------------------------------

    def _base_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        aside = {(owner, leaf): tensor for owner, leaf, tensor in self._merged.originals} if self._merged else {}
        seen: set[int] = set()
        for name, module in self.site_map.modules.items():
            for leaf, now in module._parameters.items():
                parameter = aside.get((module, leaf), now)
                if parameter is not None and id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield (f"{name}.{leaf}" if name else leaf), parameter

    def _parameter_names(self, module: str) -> list[str]:
        found = self.site_map.modules.get(module)
        return [] if found is None else list(found._parameters)

    def _check_base(self, adapter: Adapter, any_base: bool) -> None:
        recorded = adapter.facts.get("base")
        if any_base or not recorded:
            return
        fault = bases.compare(bases.Fingerprint.from_dict(recorded), self.fingerprint(without=_saved(adapter.sites)))
        if fault is not None:
            raise BaseMismatchError(fault)

    def _check_new_name(self, name: str) -> None:
        if not isinstance(name, str) or not name:
            raise ConfigError(Fault("adapter name", f"got {name!r}", "a non-empty string"))
        if name in self._configs:
            raise StateError(Fault(f"adapter '{name}'", "is attached already", "a new name",
                                   "Choose another name, or remove() it first"))

    def _check_known(self, name: str) -> None:
        if name not in self._configs:
            raise StateError(Fault(f"adapter '{name}'", "is not attached",
                                   "one of " + (", ".join(self.names) or "none"), near(str(name), self.names)))

    def _check_unmerged(self, call: str) -> None:
        if self._merged is not None:
            raise StateError(Fault(f"{call}()", f"{', '.join(self._merged.mix)} is merged into the weights",
                                   "an unmerged model", "Call unmerge() first"))


def _saved(sites: Mapping[str, SiteDelta]) -> tuple[str, ...]:
    """The modules that an adapter brings in full."""
    return tuple(sorted(name for name, site in sites.items() if site.geometry.kind == "saved"))
