"""`BaselineConfig`: the options of the methods that LoRA is compared with, each declared once.

A value, checked when it is made. Which method takes which option stands in `OPTIONS`; an option that is given to a
method without it is a fault and not ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from deltaw.errors import ConfigError, Fault, near

Method = Literal["lora", "full", "ft-top-k", "head", "bitfit", "preembed", "prelayer", "adapter-h", "adapter-l",
                 "adapter-p", "adapter-d", "lora+pe", "lora+pl", "subspace"]

_PROMPT = ("prefix_tokens", "infix_tokens")
_BOTTLENECK = ("bottleneck", "activation")
OPTIONS: Mapping[str, tuple[str, ...]] = {
    "lora": (),
    "full": (),
    "ft-top-k": ("top_layers",),
    "head": (),
    "bitfit": (),
    "preembed": _PROMPT,
    "prelayer": (*_PROMPT, "prefix_form", "prefix_hidden"),
    "adapter-h": (*_BOTTLENECK, "train_norms"),
    "adapter-l": _BOTTLENECK,
    "adapter-p": (*_BOTTLENECK, "train_norms"),
    "adapter-d": (*_BOTTLENECK, "train_norms", "drop_layers"),
    "lora+pe": _PROMPT,
    "lora+pl": _PROMPT,
    "subspace": ("dimension", "structure_aware"),
}
"""The methods, and the options that each takes; those with "lora" in their name take a `LoraConfig` too."""


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """Options of the other methods.

    >>> BaselineConfig(bottleneck=16).bottleneck
    16
    """

    top_layers: int = 2
    """ft-top-k: how many of the last layers are trained."""
    prefix_tokens: int = 8
    """Prompt methods: trained tokens before the prompt (l_p)."""
    infix_tokens: int = 0
    """Prompt methods: trained tokens after the prompt (l_i)."""
    prefix_form: Literal["activations", "past"] = "activations"
    """prelayer: replace the tokens' activations in every layer, or give every attention trained keys and values."""
    prefix_hidden: int | None = None
    """prelayer with past: width of an MLP that makes the keys and values in training and is folded away after it."""
    bottleneck: int = 64
    """Adapter methods: width r of the bottleneck."""
    activation: Literal["auto", "relu", "gelu", "silu"] = "auto"
    """Adapter methods: the non-linearity; auto is silu for adapter-h and relu for the others."""
    train_norms: bool = False
    """Adapter methods: train the model's own norms in the layers too, as Houlsby et al. do."""
    drop_layers: int = 5
    """adapter-d: the first layers, which have no adapter."""
    dimension: int = 1000
    """subspace: number d of trained values."""
    structure_aware: bool = True
    """subspace: spend one value for each layer on a scale of its own (SAID); without, it is DID."""

    def __post_init__(self) -> None:
        faults = [_fault(self, name, "a whole number >= 1") for name in ("top_layers", "bottleneck", "dimension")
                  if not _whole(getattr(self, name), 1)]
        faults += [_fault(self, name, "a whole number >= 0") for name in ("prefix_tokens", "infix_tokens",
                                                                         "drop_layers")
                   if not _whole(getattr(self, name), 0)]
        if self.prefix_hidden is not None and not _whole(self.prefix_hidden, 1):
            faults.append(_fault(self, "prefix_hidden", "a whole number >= 1, or nothing"))
        for name, words in (("prefix_form", ("activations", "past")), ("activation", ("auto", "relu", "gelu", "silu"))):
            if getattr(self, name) not in words:
                faults.append(_fault(self, name, "one of " + ", ".join(words), near(str(getattr(self, name)), words)))
        faults += [_fault(self, name, "True or False") for name in ("train_norms", "structure_aware")
                   if not isinstance(getattr(self, name), bool)]
        if faults:
            raise ConfigError(*faults)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> BaselineConfig:
        """The config with these options; an unknown key is refused with its nearest match."""
        known = [f.name for f in fields(cls)]
        faults = [Fault(f"BaselineConfig option '{key}'", "is unknown", "one of " + ", ".join(known), near(key, known))
                  for key in options if key not in known]
        if faults:
            raise ConfigError(*faults)
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """All options as plain JSON values; `from_dict` of it gives an equal config."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def prompt_tokens(self) -> int:
        """Trained tokens in all: prefix and infix."""
        return self.prefix_tokens + self.infix_tokens

    def faults(self, method: str) -> list[Fault]:
        """What of these options does not go with a method, and whether there is such a method."""
        if method not in OPTIONS:
            return [Fault("TrainConfig.method", f"got {method!r}", "one of " + ", ".join(OPTIONS),
                          near(str(method), OPTIONS))]
        found = [Fault(f"BaselineConfig.{f.name}", f"got {getattr(self, f.name)!r}", f"it to be left out for {method}",
                       "It is an option of " + ", ".join(m for m, names in OPTIONS.items() if f.name in names))
                 for f in fields(self) if getattr(self, f.name) != f.default and f.name not in OPTIONS[method]]
        prompts = "prefix_tokens" in OPTIONS[method]
        if prompts and not self.prompt_tokens:
            found.append(_fault(self, "prefix_tokens", "at least one token, before or after the prompt"))
        if prompts and self.prefix_form == "past" and (self.infix_tokens or not self.prefix_tokens):
            found.append(_fault(self, "infix_tokens", "a prefix and no infix with prefix_form past",
                                "Keys and values of the past stand before the prompt"))
        if prompts and self.prefix_hidden is not None and self.prefix_form != "past":
            found.append(_fault(self, "prefix_hidden", "prefix_form past with it"))
        return found


def trains_lora(method: str) -> bool:
    """Whether a method has a LoRA among what it trains."""
    return method.split("+")[0] == "lora"


def virtual_tokens(method: str, config: BaselineConfig) -> int:
    """How many of the base's positions a method takes for tokens of its own."""
    return config.prompt_tokens if "prefix_tokens" in OPTIONS[method] else 0


def _fault(config: BaselineConfig, name: str, expected: str, remedy: str = "") -> Fault:
    return Fault(f"BaselineConfig.{name}", f"got {getattr(config, name)!r}", expected, remedy)


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


assert set(get_args(Method)) == set(OPTIONS)
