"""Tensor names: between deltaw's sites and the keys of PEFT's `adapter_model.safetensors`, built and parsed only here.

    site (kind)                        key, after `base_model.model.`
    <module>         linear, conv      <module>.lora_A.weight                    and lora_B
    <module>         embedding         <module>.lora_embedding_A                 and lora_embedding_B
    <mha>.in_proj    attention         <mha>.lora_A.weight
    <mha>.out_proj   attention         <mha>.base_layer.out_proj.lora_A.weight
    <module>.<param> parameter         <module>[.base_layer]*.lora_A.weight      the last parameter has no base_layer
    <module>.<param> bias              <module>[.base_layer]*.<param>            one base_layer for each change to it
    <module>         saved             <module>.<tensor>

PEFT puts a wrapper around each module that it adapts, and the module itself becomes the wrapper's `base_layer`; so
every name that leads through an adapted module gets one `base_layer` for each wrapper around it. Several adapted
parameters of one module are wrappers within wrappers: the module's first parameter is innermost.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from deltaw.core.geometry import Kind

PREFIX = "base_model.model."
IN_PROJ, OUT_PROJ = "in_proj", "out_proj"
_WRAPPER = "base_layer"
_COMPILED = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module)(?=\.)")
_FACTOR = re.compile(r"(?:(?P<path>.*)\.)?lora_(?:embedding_(?P<e>[AB])|(?P<f>[AB])(?:\.default)?\.weight)")


def split(name: str) -> tuple[str, str]:
    """The module's name and the last part: `("a.b", "c")` of "a.b.c", `("", "c")` of "c"."""
    module, _, last = name.rpartition(".")
    return module, last


def join(*parts: str) -> str:
    """The parts with dots between, empty ones left out."""
    return ".".join(part for part in parts if part)


def peft_module(site: str, kind: Kind) -> str:
    """The name by which PEFT's patterns know a site: the module's, the attention's, or the parameter's."""
    return split(site)[0] if kind == "attention" else site


def attention_partner(site: str) -> str:
    """The other projection of the same attention, which PEFT always adapts too."""
    module, last = split(site)
    return join(module, OUT_PROJ if last == IN_PROJ else IN_PROJ)


class FileNames:
    """The keys of all tensors of an adapter, which depend on each other: a change wraps what lies within it.

    `kinds` gives the kind of every site in the base's own order, which matters for several parameters of one module.
    """

    def __init__(self, kinds: Mapping[str, Kind]) -> None:
        self._kinds = kinds
        self._wrappers: Counter[str] = Counter()
        self._level: dict[str, int] = {}
        self._inside: dict[str, str] = {"": ""}
        for site, kind in kinds.items():
            match kind:
                case "linear" | "conv" | "embedding":
                    self._wrappers[site] += 1
                case "attention":
                    module = split(site)[0]
                    self._wrappers[module] = self._wrappers[join(module, OUT_PROJ)] = 1
                case "parameter":
                    module = split(site)[0]
                    self._level[site] = self._wrappers[module]
                    self._wrappers[module] += 1

    def key(self, site: str, tensor: str) -> str:
        """The key of one tensor of a site: of "lora_A", "lora_B", "bias", or a saved module's own tensor."""
        module, last = split(site)
        match self._kinds[site]:
            case "linear" | "conv":
                path, leaf = self._outside(site, 0), f"{tensor}.weight"
            case "embedding":
                path, leaf = self._outside(site, 0), tensor.replace("lora_", "lora_embedding_")
            case "attention":
                path, leaf = self._outside(module if last == IN_PROJ else site, 0), f"{tensor}.weight"
            case "parameter":
                path, leaf = self._outside(module, self._level[site]), f"{tensor}.weight"
            case "bias":
                path, leaf = self._within(module), last
            case "saved":
                path, leaf = self._within(site), tensor
        return PREFIX + join(path, leaf)

    def _within(self, module: str) -> str:
        """The path to what lies inside a module of the base, in PEFT's model."""
        known = self._inside.get(module)
        if known is None:
            parent, last = split(module)
            known = join(self._within(parent), last, *[_WRAPPER] * self._wrappers[module])
            self._inside[module] = known
        return known

    def _outside(self, module: str, level: int) -> str:
        """The path to the wrapper number `level` around a module, counted from the innermost."""
        if not module:
            return join(*[_WRAPPER] * (self._wrappers[module] - 1 - level))
        parent, last = split(module)
        return join(self._within(parent), last, *[_WRAPPER] * (self._wrappers[module] - 1 - level))


@dataclass(frozen=True, slots=True)
class ParsedKey:
    """What a key says by itself, with no model and no config."""

    module: str
    """The base's own name of the module that the tensor belongs to."""
    tensor: str
    """`lora_A`, `lora_B`, or the name of a tensor of the module itself."""
    embedding: bool = False
    """The factor is an embedding's."""
    depth: int = 0
    """Number of `base_layer` between the module and the tensor."""
    hosts: tuple[str, ...] = ()
    """Modules above this one that are wrapped themselves."""

    @property
    def is_factor(self) -> bool:
        """Whether this is an A or a B."""
        return self.tensor in ("lora_A", "lora_B")


def canonical(key: str) -> str:
    """A key with PEFT's prefix exactly once and without the marks of compiled or sharded modules."""
    if "_orig_mod" in key or "_fsdp_wrapped_module" in key:
        key = _COMPILED.sub("", key).lstrip(".")
    return key if key.startswith(PREFIX) else PREFIX + key


def parse(key: str) -> ParsedKey:
    """What a canonical key says; a tensor that is not a factor is read as `<module>.<tensor>`."""
    name = key.removeprefix(PREFIX)
    match = _FACTOR.fullmatch(name)
    if match:
        path, tensor = match["path"] or "", "lora_" + (match["e"] or match["f"])
    else:
        path, tensor = split(name)
    if _WRAPPER not in path:
        return ParsedKey(path, tensor, bool(match and match["e"]))
    module, hosts, depth = "", [], 0
    for part in path.split(".") if path else ():
        if part == _WRAPPER:
            depth += 1
        elif depth:
            hosts.append(module)
            module, depth = join(module, part), 0
        else:
            module = join(module, part)
    return ParsedKey(module, tensor, bool(match and match["e"]), depth, tuple(hosts))


def outermost(path: str, ends: Iterable[str]) -> str | None:
    """The first module along a dotted path whose name ends in one of `ends`, as PEFT finds modules to save; or None."""
    ends = tuple(ends)
    parts = path.split(".")
    prefixes = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
    return next((module for module in prefixes if module.endswith(ends)), None) if ends else None


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """A key that sorts names as a reader would: layer 2 before layer 10."""
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split("."))


def matches_target(name: str, targets: Iterable[str]) -> bool:
    """Whether a name is one of the targets, or ends in a dot and one of them: PEFT's rule for lists of names."""
    return any(name == target or name.endswith(f".{target}") for target in targets)
