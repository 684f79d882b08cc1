"""`LoraConfig`: what a low-rank change looks like, in PEFT's field names.

A value, checked when it is made: frozen, with one line of documentation under each field, which the command line
and the reference pages show. Which modules of a real model it touches is worked out in `deltaw.inject`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from deltaw.errors import ConfigError, Fault, near

ALL_LINEAR = "all-linear"
LOFTQ_ITER, LOFTQ_BITS = "loftq_iter", "loftq_bits"
_NITER = re.compile(r"pissa_niter_([1-9][0-9]{0,3})")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """A low-rank change ΔW = s·BA with s = α/r, or α/√r with `use_rslora` (Hu et al. 2021, eq. 3).

    >>> LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]).scaling(8)
    2.0
    """

    r: int = 8
    """Rank of the change."""
    lora_alpha: float = 16
    """Numerator of the scale: the change is multiplied by lora_alpha / r."""
    lora_dropout: float = 0.0
    """Probability of zeroing an input of the low-rank branch in training."""
    target_modules: tuple[str, ...] | str = ALL_LINEAR
    """Names (whole, or a dotted suffix), one regular expression for the whole name, or "all-linear"."""
    exclude_modules: tuple[str, ...] | str = ()
    """Names or one regular expression of modules to leave alone although a target matches."""
    target_parameters: tuple[str, ...] = ()
    """Names of 2-D or 3-D parameters to adapt directly, such as stacked experts ("experts.gate_up_proj")."""
    target_slices: Mapping[str, str | tuple[tuple[int, int], ...]] = field(default_factory=dict)
    """Parts of a fused projection to adapt: {"c_attn": "q-v"} (equal parts, "-" leaves one alone) or output ranges."""
    layers_to_transform: tuple[int, ...] | None = None
    """Indices of the layers to adapt; the others are left alone."""
    layers_pattern: tuple[str, ...] = ()
    """Names of the module lists that `layers_to_transform` counts in; by default any list of layers."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Rank by site: a regular expression matched at the end of the site's name, after a dot or the start."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Alpha by site, matched like `rank_pattern`."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) (Kalajdzievski 2023) instead of lora_alpha / r."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Train biases too: none, all of the model's, or those of the adapted modules only."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained in full and stored with the adapter, such as a classification head."""
    init_lora_weights: bool | str = True
    """True: A Kaiming-uniform, B zero. "gaussian": A normal with deviation 1/r. "pissa", or "pissa_niter_16" by a
    faster SVD: the weight's principal part. "loftq": what packing the weight lost. False: both random (for tests)."""
    loftq_config: Mapping[str, int] = field(default_factory=dict)
    """Of "loftq": {"loftq_iter": 5} alternates five times between packing and SVD instead of once."""
    task_type: str | None = None
    """PEFT's task name, such as "CAUSAL_LM" or "SEQ_CLS"; stored, and used to find a classification head."""

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if not isinstance(value, str):
                object.__setattr__(self, name, _strings(value))
        for name in ("target_parameters", "layers_pattern", "modules_to_save"):
            object.__setattr__(self, name, _strings(getattr(self, name)))
        layers = self.layers_to_transform
        if layers is not None:
            layers = (layers,) if isinstance(layers, int) else tuple(layers)
            object.__setattr__(self, "layers_to_transform", layers)
        slices = {k: v if isinstance(v, str) else tuple((int(a), int(b)) for a, b in v)
                  for k, v in dict(self.target_slices).items()}
        object.__setattr__(self, "target_slices", slices)
        for name in ("rank_pattern", "alpha_pattern", "loftq_config"):
            object.__setattr__(self, name, dict(getattr(self, name)))
        faults = list(_faults(self))
        if faults:
            raise ConfigError(*faults)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> LoraConfig:
        """The config with these options; an unknown key is refused with its nearest match."""
        known = [f.name for f in fields(cls)]
        faults = [
            Fault(f"LoraConfig option '{key}'", "is unknown", "one of " + ", ".join(known), near(key, known))
            for key in options if key not in known
        ]
        if faults:
            raise ConfigError(*faults)
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """All options as plain JSON values; `from_dict` of it gives an equal config."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    @property
    def starts_from_weights(self) -> bool:
        """Whether new factors are worked out from the base's weights, as PiSSA's and LoftQ's are."""
        return isinstance(self.init_lora_weights, str) and self.init_lora_weights != "gaussian"

    @property
    def pissa_iterations(self) -> int | None:
        """Power iterations of "pissa_niter_16"; None for an exact SVD."""
        found = _NITER.fullmatch(str(self.init_lora_weights))
        return None if found is None else int(found[1])

    def as_difference(self) -> LoraConfig:
        """The config of the stored change s·(BA - B₀A₀): twice the rank at the same scale."""
        grows = 2**0.5 if self.use_rslora else 2
        return replace(self, r=2 * self.r, lora_alpha=grows * self.lora_alpha, init_lora_weights=True, loftq_config={},
                       rank_pattern={site: 2 * rank for site, rank in self.rank_pattern.items()},
                       alpha_pattern={site: grows * alpha for site, alpha in self.alpha_pattern.items()})

    def rank_at(self, site: str) -> int:
        """The rank at a site: `rank_pattern`'s first match, else `r`."""
        return int(_by_pattern(self.rank_pattern, site, self.r))

    def alpha_at(self, site: str) -> float:
        """The alpha at a site: `alpha_pattern`'s first match, else `lora_alpha`."""
        return float(_by_pattern(self.alpha_pattern, site, self.lora_alpha))

    def scaling(self, rank: int, site: str = "") -> float:
        """The factor s of ΔW = s·BA at a site of this rank: α/r, or α/√r with `use_rslora`."""
        alpha = self.alpha_at(site)
        return float(alpha / rank**0.5 if self.use_rslora else alpha / rank)


def matches_suffix(pattern: str, name: str) -> bool:
    """Whether `pattern`, a regular expression, matches all of `name` or what follows one of its dots."""
    return re.match(_at_end(pattern), name) is not None


def _at_end(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _by_pattern(patterns: Mapping[str, float], site: str, default: float) -> float:
    for pattern, value in patterns.items():
        if matches_suffix(pattern, site):
            return value
    return default


def _strings(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _faults(config: LoraConfig) -> list[Fault]:
    """All that is wrong with the values themselves, without a model."""
    found = []

    def check(ok: bool, name: str, got: object, expected: str, remedy: str = "") -> None:
        if not ok:
            found.append(Fault(f"LoraConfig.{name}", f"got {got!r}", expected, remedy))

    ranks = {"r": config.r} | {f"rank_pattern[{k!r}]": v for k, v in config.rank_pattern.items()}
    for name, rank in ranks.items():
        check(isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1, name, rank, "a whole number >= 1",
              "To leave a module alone, use exclude_modules")
    for name, alpha in ({"lora_alpha": config.lora_alpha} | {f"alpha_pattern[{k!r}]": v
                        for k, v in config.alpha_pattern.items()}).items():
        check(isinstance(alpha, (int, float)) and 0 < alpha < math.inf, name, alpha, "a finite number above 0")
    check(isinstance(config.lora_dropout, (int, float)) and 0 <= config.lora_dropout < 1, "lora_dropout",
          config.lora_dropout, "0 <= p < 1")
    check(config.bias in ("none", "all", "lora_only"), "bias", config.bias, '"none", "all" or "lora_only"')
    init = config.init_lora_weights
    check(isinstance(init, bool) or init in ("gaussian", "pissa", "loftq") or _NITER.fullmatch(str(init)) is not None,
          "init_lora_weights", init, 'True, False, "gaussian", "pissa", "pissa_niter_<number>" or "loftq"',
          near(str(init), ("gaussian", "pissa", "loftq")))
    check(set(config.loftq_config) <= {LOFTQ_ITER, LOFTQ_BITS} and all(
        type(value) is int and value >= 1 for value in config.loftq_config.values()), "loftq_config",
        config.loftq_config, "{'loftq_iter': a whole number >= 1}")
    empty = not (config.target_modules or config.target_parameters or config.modules_to_save)
    check(not empty, "target_modules", config.target_modules, "at least one target", 'Use "all-linear" for all')
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        if isinstance(value, str):
            found.extend(_regex_fault(f"LoraConfig.{name}", value))
    for pattern in (*config.rank_pattern, *config.alpha_pattern):
        found.extend(_regex_fault("LoraConfig.rank_pattern or alpha_pattern", pattern))
    return found


def _regex_fault(where: str, pattern: str) -> list[Fault]:
    try:
        re.compile(_at_end(pattern))
    except (re.error, OverflowError) as error:
        return [Fault(where, f"got {pattern!r}", "a regular expression", f"It does not parse: {error}")]
    return []
