"""`deltaw.json`: what deltaw knows of an adapter that PEFT's two files cannot say.

    format          number of this layout; a larger one is refused
    deltaw          version that wrote it
    config          deltaw's own config
    written         digest of the adapter_config.json written from it: once that file is changed, it counts
    sites           geometry and rank of each site, in the base's order
    facts           base fingerprint, template hash, how it was trained
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from deltaw import __version__
from deltaw.core.config import LoraConfig
from deltaw.core.geometry import Geometry
from deltaw.errors import AdapterFileError, ConfigError, Fault
from deltaw.store.from_peft_config import FIELDS, in_file, option_fault
from deltaw.store.tensors import are_sizes, name_fault, shown

FORMAT = 1
_KINDS = ("linear", "attention", "embedding", "conv", "parameter", "bias", "saved")
_DIMENSIONS = {"linear": (2,), "attention": (2,), "embedding": (2,), "conv": (3, 4, 5), "parameter": (2, 3)}
"""How many sizes the shape of a weight of each kind has."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SiteRecord:
    """One site: its geometry, and how its own factors lie in the file's."""

    geometry: Geometry
    rank: int = 0
    """The site's own rank; the file's can be larger. 0 where there are no factors."""
    gain: float = 1.0
    """The file's B is this much larger than the site's own."""
    tensors: tuple[str, ...] = ("lora_A", "lora_B")
    """Names of the site's tensors."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """All of `deltaw.json`."""

    config: LoraConfig
    written: str
    """Digest of the adapter_config.json that goes with `config`."""
    sites: Mapping[str, SiteRecord]
    facts: Mapping[str, Any] = field(default_factory=dict)


def digest(content: bytes) -> str:
    """The SHA-256 of a file's content."""
    return hashlib.sha256(content).hexdigest()


def to_json(record: Record) -> bytes:
    """The file's content."""
    sites = {name: _site_to_json(site) for name, site in record.sites.items()}
    content = {"format": FORMAT, "deltaw": __version__, "written": record.written, "config": record.config.to_dict(),
               "facts": dict(record.facts), "sites": sites}
    return json.dumps(content, indent=1).encode()


def from_json(content: Any, path: Path) -> Record:
    """The record in a parsed `deltaw.json`; `AdapterFileError` if it is not one, or one of a later version."""
    number = _take(content, "format", int, path)
    if number > FORMAT:
        raise AdapterFileError(Fault(str(path), f"is of format {number}", f"at most {FORMAT}", "Update deltaw"))
    sites = {name: _site_from_json(name, site, path) for name, site in _take(content, "sites", dict, path).items()}
    return Record(config=_config_from_json(_take(content, "config", dict, path), path), sites=sites,
                  written=_take(content, "written", str, path), facts=_take(content, "facts", dict, path))


def _take(content: Any, key: str, kind: type[T], path: Path) -> T:
    """The value of a key, of this kind; the fault names the file and the key."""
    value = content.get(key) if isinstance(content, dict) else None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise _malformed(f"{path}: {shown(key)}", f"is {shown(repr(value))}")
    return value


def _malformed(where: str, got: str) -> AdapterFileError:
    return AdapterFileError(Fault(where, got, "what deltaw writes", "Delete deltaw.json to read PEFT's files alone"))


def _config_from_json(options: Mapping[str, Any], path: Path) -> LoraConfig:
    faults = [fault for name, value in options.items() if name in FIELDS and (fault := option_fault(name, value, path))]
    if faults:
        raise AdapterFileError(*faults)
    try:
        return LoraConfig.from_dict(options)
    except ConfigError as error:
        raise AdapterFileError(*(in_file(path, fault) for fault in error.faults)) from error
    except (TypeError, ValueError, AttributeError) as error:
        raise _malformed(f"{path}: config", f"is malformed ({error})") from error


def _site_to_json(site: SiteRecord) -> dict[str, Any]:
    geometry = site.geometry
    content: dict[str, Any] = {"kind": geometry.kind, "shape": list(geometry.shape)}
    if site.rank:
        content["rank"] = site.rank
    else:
        content["tensors"] = list(site.tensors)
    if geometry.transposed:
        content["transposed"] = True
    if geometry.groups != 1:
        content["groups"] = geometry.groups
    if geometry.slices:
        content["slices"] = [list(part) for part in geometry.slices]
    if site.gain != 1.0:
        content["gain"] = site.gain
    return content


def _site_from_json(name: str, content: Any, path: Path) -> SiteRecord:
    def refused(got: str) -> AdapterFileError:
        return _malformed(f"{path}: site '{shown(name)}'", got)

    if not isinstance(content, dict) or (name and name_fault(name)):
        raise refused("is malformed")
    kind: Any = content.get("kind")
    shape: Any = content.get("shape")
    rank, groups, gain = content.get("rank", 0), content.get("groups", 1), content.get("gain", 1.0)
    slices, tensors = content.get("slices"), content.get("tensors", ["lora_A", "lora_B"])
    factors = kind not in ("bias", "saved")
    right = (
        kind in _KINDS and are_sizes(shape) and len(shape) in _DIMENSIONS.get(kind, range(9))
        and type(rank) is int and (rank >= 1) == factors and rank < 1 << 32
        and type(groups) is int and groups >= 1 and type(content.get("transposed", False)) is bool
        and type(gain) in (int, float) and 0 < gain < 1e300
        and isinstance(tensors, list) and all(isinstance(t, str) for t in tensors)
        and _slices(slices) and not (kind == "conv" and shape[0] % groups)
    )
    if not right:
        raise refused(f"is {shown(repr(content))}")
    geometry = Geometry(kind=kind, shape=tuple(shape), transposed=content.get("transposed", False), groups=groups,
                        slices=tuple((a, b) for a, b in slices) if slices else None)
    if slices and slices[-1][1] > geometry.out_features:
        raise refused(f"has slices beyond its {geometry.out_features} outputs")
    return SiteRecord(geometry=geometry, rank=rank, gain=float(gain), tensors=tuple(tensors))


def _slices(value: Any) -> bool:
    """Whether these are ranges [start, stop) one after another, or none."""
    if value is None:
        return True
    if not (isinstance(value, list) and value and all(are_sizes(part) and len(part) == 2 for part in value)):
        return False
    ends = [end for part in value for end in part]
    return all(start < stop for start, stop in value) and ends == sorted(ends)
