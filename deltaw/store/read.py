"""`load`: an adapter from PEFT's folder, checked whole before anything of it is used."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from deltaw.core.adapter import Adapter, SiteDelta
from deltaw.core.config import LoraConfig
from deltaw.core.geometry import Geometry, Kind
from deltaw.errors import AdapterFileError, Fault, near
from deltaw.store import names, record
from deltaw.store.factors import from_file
from deltaw.store.from_peft_config import from_peft, in_file, out_proj_counts
from deltaw.store.infer import Findings, Placed, infer
from deltaw.store.locate import CONFIG_FILE, RECORD_FILE, TENSORS_FILE, find_folder
from deltaw.store.record import Record
from deltaw.store.tensors import limited, read_tensors, shown
from deltaw.store.to_peft_config import Strength, alpha_for, with_exact

MAX_JSON = 64_000_000
"""Bytes of the longest JSON file that is read."""
_ATTEMPTS = 5
_REWRITTEN = "If another program rewrote the weights, delete deltaw.json to read PEFT's two files alone"


def load(path_or_hub_id: str | Path, *, revision: str | None = None, subfolder: str | None = None) -> Adapter:
    """The adapter in a local folder, or of a Hub id at a revision; in a subfolder of it, if one is named.

    Its tensors are on the CPU in the file's dtype. `AdapterFileError` lists all that is wrong: a pickle, a damaged or
    hostile file, NaN, tensors unknown, missing or of the wrong shape, options that are not supported.
    """
    error: Exception | None = None
    for _ in range(_ATTEMPTS):
        folder = find_folder(path_or_hub_id, revision=revision, subfolder=subfolder)
        before = _identity(folder)
        try:
            adapter = _read(folder)
        except (AdapterFileError, OSError) as caught:
            error = caught
        else:
            error = None
        if _identity(folder) == before:  # else it was replaced while it was read, and what was read may be mixed
            break
    else:
        error = error or OSError("it is being replaced again and again")
    if error is None:
        return adapter
    if isinstance(error, AdapterFileError):
        raise error
    why = getattr(error, "strerror", None) or error
    raise AdapterFileError(Fault(str(path_or_hub_id), f"cannot be read ({why})")) from error


def _identity(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from another one that took its place."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _read(folder: Path) -> Adapter:
    """The adapter in this very folder."""
    config_path, tensors_path = folder / CONFIG_FILE, folder / TENSORS_FILE
    content = _content(config_path)
    options = _json(content, config_path)
    about = _record(folder / RECORD_FILE)
    own = about is not None and about.written == record.digest(content)
    config = about.config if about is not None and own else from_peft(options, config_path)
    tensors = _canonical(read_tensors(tensors_path), tensors_path)
    if about is None:
        found = infer(tensors, config, fan_in_fan_out=options.get("fan_in_fan_out") is True,
                      out_proj_gain=1 / out_proj_counts(options))
    else:
        found = _recorded(about, tensors)
    sites, wanted = _sites(found, tensors, config, None if own else options)
    if found.faults or not sites:
        faults = found.faults or [Fault(str(tensors_path), "holds no change", "the factors of an adapter")]
        raise AdapterFileError(*limited([in_file(tensors_path, fault) for fault in faults], tensors_path))
    return Adapter(with_exact(config, wanted), sites, _facts(options, about, found))


def _content(path: Path) -> bytes:
    with path.open("rb") as file:
        content = file.read(MAX_JSON + 1)
    if len(content) > MAX_JSON:
        raise AdapterFileError(Fault(str(path), f"is longer than {MAX_JSON} bytes", "a config file"))
    return content


def _json(content: bytes, path: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(Fault(str(path), "is not JSON", "a JSON object", "The file is damaged")) from error
    if not isinstance(parsed, dict):
        raise AdapterFileError(Fault(str(path), f"is a JSON {type(parsed).__name__}", "a JSON object"))
    return parsed


def _record(path: Path) -> Record | None:
    """What `deltaw.json` says, or None where there is none, as in folders that PEFT wrote."""
    if not path.is_file():
        return None
    return record.from_json(_json(_content(path), path), path)


def _canonical(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    faults = []
    for key, tensor in tensors.items():
        name = names.canonical(key)
        if name in found:
            faults.append(Fault(f"{path}: '{shown(key)}'", "says the same as another tensor", "each tensor once"))
        found[name] = tensor
    if faults:
        raise AdapterFileError(*limited(faults, path))
    return found


def _recorded(about: Record, tensors: Mapping[str, Tensor]) -> Findings:
    """Where the tensors of the recorded sites are in the file."""
    found = Findings()
    kinds: dict[str, Kind] = {name: site.geometry.kind for name, site in about.sites.items()}
    partners = [names.attention_partner(name) for name, kind in kinds.items() if kind == "attention"]
    alone = [name for name in partners if name not in kinds]
    keys = names.FileNames(kinds | dict.fromkeys(alone, "attention"))
    for name, site in about.sites.items():
        found.sites[name] = Placed(geometry=site.geometry, rank=site.rank, gain=site.gain,
                                   keys={tensor: keys.key(name, tensor) for tensor in site.tensors})
    expected = {key for site in found.sites.values() for key in site.keys.values()}
    for name in alone:
        pair = {tensor: keys.key(name, tensor) for tensor in ("lora_A", "lora_B")}
        expected |= set(pair.values())
        if all(key in tensors and bool(tensors[key].count_nonzero()) for key in pair.values()):
            A, B = tensors[pair["lora_A"]], tensors[pair["lora_B"]]
            geometry = Geometry(kind="attention", shape=(B.shape[0], A.shape[-1]))
            found.sites[name] = Placed(geometry=geometry, keys=pair, rank=A.shape[0])
    found.faults += [Fault(f"tensor '{shown(key)}'", "is missing", "every tensor of the sites in deltaw.json",
                           near(key, tensors, limit=1) or _REWRITTEN) for key in sorted(expected - set(tensors))]
    found.faults += [Fault(f"tensor '{shown(key)}'", "is unknown", "only tensors of the sites in deltaw.json",
                           near(key, expected, limit=1) or _REWRITTEN) for key in sorted(set(tensors) - expected)]
    found.sites = {name: site for name, site in found.sites.items() if set(site.keys.values()) <= set(tensors)}
    return found


def _sites(found: Findings, tensors: Mapping[str, Tensor], config: LoraConfig,
           options: Mapping[str, Any] | None) -> tuple[dict[str, SiteDelta], dict[str, Strength]]:
    """The sites with their tensors, and the rank and alpha that the config must have there.

    `options` are PEFT's, where the config comes from them. With deltaw's own config, rank and alpha matter only where
    the factors no longer have the form that they were saved in.
    """
    sites: dict[str, SiteDelta] = {}
    wanted: dict[str, Strength] = {}
    for name, place in found.sites.items():
        values = {tensor: tensors[key] for tensor, key in place.keys.items()}
        if place.rank == 0:
            sites[name] = SiteDelta(place.geometry, values)
            if place.geometry.kind == "bias" and any(v.shape != place.geometry.shape for v in values.values()):
                _add_shape_fault(found, name, place, values)
            continue
        site = _site(place, values["lora_A"], values["lora_B"], any_rank=options is not None)
        if site is None:
            _add_shape_fault(found, name, place, values)
            continue
        sites[name] = site
        file_rank = values["lora_A"].shape[0] // place.geometry.experts
        module = names.peft_module(name, place.geometry.kind)
        if options is None:
            if site.rank != place.rank:
                scale = config.scaling(place.rank, name)
                wanted[name] = site.rank, alpha_for(scale, site.rank, rslora=config.use_rslora)
        elif config.rank_at(module) != file_rank:
            found.faults.append(Fault(f"tensor '{shown(place.keys['lora_A'])}'", f"is of rank {file_rank}",
                                      f"{config.rank_at(module)}, as {CONFIG_FILE} says",
                                      "The config does not belong to these tensors, or lacks a rank_pattern"))
        else:
            is_out_proj = place.geometry.kind == "attention" and names.split(name)[1] == names.OUT_PROJ
            gain = place.gain * (out_proj_counts(options) if is_out_proj else 1.0)
            wanted[name] = site.rank, _alpha(config, module, file_rank, site.rank, gain)
    return sites, wanted


def _site(place: Placed, A: Tensor, B: Tensor, *, any_rank: bool) -> SiteDelta | None:
    """The site's own factors out of the file's; None where they do not fit its geometry, or its rank."""
    geometry = place.geometry
    if A.ndim != B.ndim or A.ndim != (len(geometry.shape) if geometry.kind == "conv" else 2):
        return None
    if not A.is_floating_point() or not B.is_floating_point() or not A.numel() or not B.numel():
        return None
    factors = from_file(A, B, geometry, place.rank, place.gain)
    if factors is None:  # no longer in the form that it was saved in
        geometry, any_rank = replace(geometry, slices=None), True
        factors = A, B if place.gain == 1.0 else B / place.gain
    A, B = factors
    if not geometry.fits(A, B) or not (any_rank or geometry.rank_of(A, B) == place.rank):
        return None
    return SiteDelta(geometry, {"lora_A": A, "lora_B": B})


def _add_shape_fault(found: Findings, name: str, place: Placed, values: Mapping[str, Tensor]) -> None:
    got = ", ".join(f"{tensor} of {str(value.dtype).removeprefix('torch.')} and shape {tuple(value.shape)}"
                    for tensor, value in values.items())
    rank = f" at rank {place.rank}" if place.rank else ""
    found.faults.append(Fault(f"site '{shown(name)}'", f"has {got}",
                              f"tensors for a base weight of shape {place.geometry.shape}{rank}", _REWRITTEN))


def _alpha(config: LoraConfig, module: str, file_rank: int, rank: int, gain: float) -> float:
    """The alpha that gives a site its scale in the file times `gain`, at its own rank."""
    alpha = config.alpha_at(module)
    if rank == file_rank and gain == 1.0:
        return alpha
    scale = alpha / (math.sqrt(file_rank) if config.use_rslora else file_rank)
    return alpha_for(scale * gain, rank, rslora=config.use_rslora)


def _facts(options: Mapping[str, Any], about: Record | None, found: Findings) -> dict[str, Any]:
    """What deltaw wrote beside the files, and what PEFT's config names."""
    named = {"base_model": options.get("base_model_name_or_path"), "revision": options.get("revision")}
    return ({key: value for key, value in named.items() if isinstance(value, str)}
            | (dict(about.facts) if about is not None else {}) | found.facts)
