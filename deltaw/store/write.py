"""`save`: an adapter becomes PEFT's folder with `deltaw.json` beside it, all at once or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from deltaw.core.adapter import Adapter
from deltaw.core.geometry import Geometry, Kind
from deltaw.errors import AdapterFileError, Fault
from deltaw.store import names, record
from deltaw.store.atomic import replace_folder
from deltaw.store.factors import FileFactors, no_change, pair_up, to_file
from deltaw.store.locate import CONFIG_FILE, RECORD_FILE, TENSORS_FILE
from deltaw.store.record import Record, SiteRecord
from deltaw.store.tensors import to_bytes
from deltaw.store.to_peft_config import Strength, alpha_for, to_peft


def save(adapter: Adapter, path: str | Path) -> None:
    """Write an adapter as a folder that PEFT, and what reads PEFT's files, can load.

    A folder that is already there is replaced in one step, so that a crash leaves the old or the new one; its other
    files are kept. `adapter.facts` must be plain JSON values. Raises `AdapterFileError`, with nothing changed, if the
    adapter holds a NaN or an infinity, or if the files cannot be written.
    """
    factors = _file_factors(adapter)
    tensors = _named(adapter, factors)
    config_file = json.dumps(_peft_config(adapter, factors), indent=2, sort_keys=True).encode()
    sites = {name: _site_record(name, adapter, factors) for name in adapter.sites}
    about = Record(config=adapter.config, written=record.digest(config_file), sites=sites, facts=adapter.facts)
    replace_folder(path, {CONFIG_FILE: config_file, TENSORS_FILE: to_bytes(tensors, path),
                          RECORD_FILE: record.to_json(about)})


def _file_factors(adapter: Adapter) -> dict[str, FileFactors]:
    """The factors of every site, and of the projections that PEFT adapts besides, in the file's form."""
    faults = [Fault(f"site '{name}'", f"has factors of shapes {tuple(site.A.shape)} and {tuple(site.B.shape)}",
                    f"factors for a base weight of shape {site.geometry.shape}")
              for name, site in adapter.sites.items() if site.is_low_rank and not site.geometry.fits(site.A, site.B)]
    if faults or not adapter.sites:
        raise AdapterFileError(*faults or [Fault("the adapter", "has no sites", "at least one change to save")])
    factors = {name: to_file(site.A.detach(), site.B.detach(), site.geometry, adapter.scaling(name))
               for name, site in adapter.sites.items() if site.is_low_rank}
    attentions = [name for name, site in adapter.sites.items() if site.geometry.kind == "attention"]
    for name in attentions:
        partner = names.attention_partner(name)
        if partner not in factors:
            factors[partner] = no_change(factors[name], partner)
    for module in {names.split(name)[0] for name in attentions}:
        both = names.join(module, names.IN_PROJ), names.join(module, names.OUT_PROJ)
        factors[both[0]], factors[both[1]] = pair_up(factors[both[0]], factors[both[1]])
    return factors


def _kinds(adapter: Adapter, factors: Mapping[str, FileFactors]) -> dict[str, Kind]:
    """The kind of every site of the file, in the base's order."""
    kinds: dict[str, Kind] = {name: site.geometry.kind for name, site in adapter.sites.items()}
    return kinds | {name: "attention" for name in factors if name not in kinds}


def _named(adapter: Adapter, factors: Mapping[str, FileFactors]) -> dict[str, Tensor]:
    """All tensors by their keys in the file."""
    keys = names.FileNames(_kinds(adapter, factors))
    found = {}
    for name, pair in factors.items():
        found[keys.key(name, "lora_A")], found[keys.key(name, "lora_B")] = pair.A, pair.B
    for name, site in adapter.sites.items():
        if not site.is_low_rank:
            found |= {keys.key(name, tensor): value.detach() for tensor, value in site.tensors.items()}
    return found


def _peft_config(adapter: Adapter, factors: Mapping[str, FileFactors]) -> dict[str, Any]:
    modules: dict[str, Strength] = {}
    parameters: dict[str, Strength] = {}
    kinds = _kinds(adapter, factors)
    for name, pair in factors.items():
        known = adapter.sites.get(name)
        as_it_is = known is not None and pair.gain == 1.0 and pair.rank == known.rank
        alpha = (adapter.config.alpha_at(name) if as_it_is
                 else alpha_for(pair.scale, pair.rank, rslora=adapter.config.use_rslora))
        group = parameters if kinds[name] == "parameter" else modules
        group.setdefault(names.peft_module(name, kinds[name]), (pair.rank, alpha))
    geometries = [site.geometry for site in adapter.sites.values()]
    transposed = any(geometry.transposed for geometry in geometries if geometry.kind == "linear")
    return to_peft(adapter.config, modules, parameters, transposed=transposed, facts=adapter.facts)


def _site_record(name: str, adapter: Adapter, factors: Mapping[str, FileFactors]) -> SiteRecord:
    site = adapter.sites[name]
    geometry: Geometry = site.geometry
    if not site.is_low_rank:
        return SiteRecord(geometry=geometry, tensors=tuple(site.tensors))
    return SiteRecord(geometry=geometry, rank=site.rank, gain=factors[name].gain)
