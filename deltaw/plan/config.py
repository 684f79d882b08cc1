"""`PlanConfig`: what is asked of a plan, as a value. The line under each field is also the command line's help."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from deltaw.core.config import LoraConfig
from deltaw.core.formats import tables_alone
from deltaw.errors import ConfigError, Fault, near

Method = Literal["full", "bitfit", "preembed", "prelayer", "adapter-h", "adapter-l", "adapter-p", "lora", "qlora"]
METHODS: tuple[Method, ...] = get_args(Method)
SHOWN: tuple[Method, ...] = ("full", "bitfit", "prelayer", "adapter-h", "lora", "qlora")
QUANTIZATIONS = ("none", "nf4", "fp4", "int8")


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Everything that decides what a run needs. Options of training have the names they have there.

    >>> PlanConfig(model="llama-7b", batch_size=1, max_length=512).methods
    ('full', 'bitfit', 'prelayer', 'adapter-h', 'lora', 'qlora')
    """

    model: str
    """The base: a Hub id (only its headers are read), a folder, a GGUF file, or the name of a published shape."""
    task: Literal["causal-lm", "seq-cls"] = "causal-lm"
    """causal-lm (answer by writing text) or seq-cls (choose one label)."""
    num_labels: int = 2
    """Labels of a classifier."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """The low-rank change."""
    methods: tuple[Method, ...] = SHOWN
    """Ways of tuning to set side by side."""
    virtual_tokens: int = 16
    """Trained positions of prompt and prefix tuning."""
    bottleneck: int = 64
    """Width of the adapter layers of Houlsby, Lin and Pfeiffer."""

    batch_size: int = 8
    """Examples per forward pass."""
    max_length: int = 1024
    """Tokens of an example, all of them as long."""
    supervised: float = 1.0
    """Share of the tokens that is learned from: only those have logits."""
    grad_accumulation: int = 1
    """Forward passes per optimizer step."""
    packing: Literal["auto", "off"] = "auto"
    """Lay a batch's examples end to end instead of padding them, where the base lets it."""
    gradient_checkpointing: Literal["off", "layer", "attention"] = "off"
    """Compute activations twice: those of each layer, or of its attention only."""
    release_memory: bool = False
    """Give freed memory back to the system after each step (on a CPU): a little less at the peak, slower steps."""
    freeze_a: bool = False
    """LoRA-FA: train B alone over a random A."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """AdamW with float32 state, or with 8-bit state."""
    dtype: str = "auto"
    """Number format of the base: bf16, fp16, fp32, or auto (bf16 on a GPU and where the processor is fast at it)."""
    quantize: Literal["none", "nf4", "fp4", "int8"] = "nf4"
    """Format of the frozen base of qlora."""
    double_quant: bool = True
    """For nf4 and fp4: pack the scales of the blocks too (4.13 instead of 4.5 bits a number)."""
    quantize_tables: Literal["none", "int8"] = "none"
    """For qlora: store the embedding and the output layer too, in int8 with one scale for each row."""
    adapters: int = 1
    """Adapters that are trained, or kept ready, over one base."""
    rows: int | None = None
    """Training examples, for the time of a whole run."""
    epochs: float = 1.0
    """Passes over the training data."""
    max_steps: int | None = None
    """Optimizer steps; overrides epochs."""
    eval_rows: int | None = None
    """Held-out examples of an evaluation, for the time of a whole run."""
    evaluations: int = 7
    """How often a run evaluates them: before, after and five times on the way."""
    max_new_tokens: int = 64
    """Longest answer, in tokens, that an evaluation generates."""

    device: str = "auto"
    """Where it would run: auto and cpu are this machine; or the name of a device, such as h100, rtx4090 or m2."""
    memory: str | None = None
    """Memory that there is, such as 14GB; by default that of the device."""
    threads: int | None = None
    """CPU threads; by default one for each core."""
    mean_tokens: float | None = None
    """Tokens of a forward pass on average, for its time; by default batch_size x max_length."""
    updates: float | None = None
    """Adapters that are updated in a step on average, for its time; by default all of them."""
    resident: int | None = None
    """Bytes that the process holds before a weight is loaded; by default what libraries are known to take."""

    def __post_init__(self) -> None:
        faults: list[Fault | str] = []
        lora: Any = self.lora
        if isinstance(lora, Mapping):
            try:
                object.__setattr__(self, "lora", LoraConfig.from_dict(lora))
            except ConfigError as error:
                faults.extend(error.faults)
        methods: Any = self.methods
        object.__setattr__(self, "methods", (methods,) if isinstance(methods, str) else tuple(methods))
        faults.extend(_faults(self))
        if faults:
            raise ConfigError(*faults)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> PlanConfig:
        """The config with these options; unknown keys are refused with near matches, all at once."""
        known = [f.name for f in fields(cls)]
        faults = [Fault(f"PlanConfig option '{key}'", "is unknown", "an option of PlanConfig", near(key, known))
                  for key in options if key not in known]
        if "model" not in options:
            faults.append(Fault("PlanConfig option 'model'", "is missing", "a value"))
        if faults:
            raise ConfigError(*faults)
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """All options as plain JSON values."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return values | {"lora": self.lora.to_dict(), "methods": list(self.methods)}

    def with_rank(self, rank: int) -> PlanConfig:
        """The same with another rank everywhere."""
        return replace(self, lora=replace(self.lora, r=rank, rank_pattern={}))

    @property
    def tokens(self) -> int:
        """Tokens of a forward pass."""
        return self.batch_size * self.max_length

    def supervised_tokens(self, batch: int, length: int) -> int:
        """Tokens that are learned from, of this many examples of this length; one at least."""
        return max(1, round(batch * length * self.supervised))

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the run, where they can be known."""
        if self.max_steps is not None:
            return self.max_steps
        if self.rows is None:
            return None
        batches = math.ceil(self.rows / self.batch_size)
        return max(1, math.ceil(self.epochs * batches / self.grad_accumulation))


def _faults(config: PlanConfig) -> list[Fault]:
    found: list[Fault] = []

    def check(ok: bool, name: str, expected: str, remedy: str = "") -> None:
        if not ok:
            found.append(Fault(f"PlanConfig.{name}", f"got {getattr(config, name)!r}", expected, remedy))

    choices = {"task": ("causal-lm", "seq-cls"), "packing": ("auto", "off"), "optimizer": ("adamw", "adamw8bit"),
               "gradient_checkpointing": ("off", "layer", "attention"), "quantize": QUANTIZATIONS,
               "quantize_tables": ("none", "int8"),
               "dtype": ("auto", "bf16", "fp16", "fp32", "bfloat16", "float16", "float32")}
    for name, words in choices.items():
        value = getattr(config, name)
        check(value in words, name, "one of " + ", ".join(words), near(str(value), words))
    for method in config.methods:
        check(method in METHODS, "methods", "of " + ", ".join(METHODS), near(str(method), METHODS))
    check(bool(config.methods), "methods", "at least one of " + ", ".join(METHODS))
    check(isinstance(config.model, str) and config.model != "", "model", "a text that is not empty")
    check(isinstance(config.device, str) and config.device != "", "device", "a device's name")
    for name in ("num_labels", "virtual_tokens", "bottleneck", "batch_size", "max_length", "grad_accumulation",
                 "adapters", "evaluations", "max_new_tokens"):
        check(_whole(getattr(config, name)), name, "a whole number >= 1")
    for name in ("rows", "eval_rows", "max_steps", "threads", "resident"):
        value = getattr(config, name)
        check(value is None or _whole(value), name, "a whole number >= 1, or nothing")
    for name in ("release_memory", "double_quant", "freeze_a"):
        check(isinstance(getattr(config, name), bool), name, "true or false")
    for name in ("mean_tokens", "updates"):
        value = getattr(config, name)
        check(value is None or 0 < value < math.inf, name, "a number above 0, or nothing")
    share: Any = config.supervised
    check(isinstance(share, (int, float)) and 0 < share <= 1, "supervised", "0 < share <= 1")
    check(isinstance(config.epochs, (int, float)) and 0 < config.epochs < math.inf, "epochs", "a number above 0")
    check(isinstance(config.lora, (LoraConfig, Mapping)), "lora", "a LoraConfig")
    alone = tables_alone("PlanConfig.quantize_tables", config.quantize, config.quantize_tables)
    found += [alone] if alone is not None else []
    if config.memory is not None:
        found.extend(_memory_faults(config.memory))
    return found


def _memory_faults(text: object) -> list[Fault]:
    try:
        parse_memory(str(text))
    except ConfigError as error:
        return [fault for fault in error.faults if isinstance(fault, Fault)]
    return []


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_memory(text: str) -> int:
    """Bytes of "14GB", "512MiB" or "8e9".

    >>> parse_memory("14GB"), parse_memory("1.5 GiB")
    (14000000000, 1610612736)
    """
    cleaned = text.strip().upper().replace(" ", "")
    number = cleaned.rstrip("BGIKMT")
    unit = cleaned[len(number):]
    try:
        size = float(number) * _UNITS[unit]
        if not 0 < size < math.inf:
            raise ValueError
    except (ValueError, KeyError) as error:
        raise ConfigError(Fault("memory", f"got {text!r}", "a size such as 14GB, 512MiB or 8e9")) from error
    return int(size)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
