"""Which adapted parameter is which, once the model is known: PEFT's files do not say it, so `infer` assumed it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from deltaw.core.adapter import Adapter, SiteDelta
from deltaw.errors import AdapterFileError, Fault
from deltaw.store import names
from deltaw.store.infer import parameter_geometry

UNSETTLED = "unsettled_parameters"


def settle_parameters(adapter: Adapter, parameters_of: Callable[[str], Sequence[str]]) -> Adapter:
    """The adapter with its parameters named as a model has them; the same one if nothing about it was assumed.

    `parameters_of` gives the names of a module's own parameters in the module's order, in which PEFT nests them.
    """
    unsettled = adapter.facts.get(UNSETTLED)
    if not unsettled:
        return adapter
    renamed: dict[str, str] = {}
    faults = []
    for module, assumed in unsettled.items():
        order = [name for name in parameters_of(module) if name in assumed["candidates"]]
        if len(order) == len(assumed["sites"]):
            renamed |= {site: names.join(module, name) for site, name in zip(assumed["sites"], order, strict=True)}
        else:
            faults.append(Fault(f"module '{module}'", f"has {len(order)} of the parameters {assumed['candidates']}",
                                f"{len(assumed['sites'])}, as many as the adapter changes"))
    if faults:
        raise AdapterFileError(*faults)
    sites = {}
    for name, site in adapter.sites.items():
        if name in renamed:
            name = renamed[name]
            geometry = parameter_geometry(site.A, site.B, adapter.config.rank_at(name))
            if geometry is None:
                raise AdapterFileError(Fault(f"site '{name}'", f"has {site.A.shape[0]} rows in lora_A",
                                             f"a multiple of its rank {adapter.config.rank_at(name)}"))
            site = SiteDelta(geometry, site.tensors)
        sites[name] = site
    return Adapter(adapter.config, sites, {key: value for key, value in adapter.facts.items() if key != UNSETTLED})
