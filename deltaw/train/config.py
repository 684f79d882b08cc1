"""`TrainConfig`: one training run as a value: base, data, the change to train, and how.

Frozen and checked when it is made; every fault is named at once. The docstring line under each field is also the
command line's help. What depends on the data (numbers of steps) is worked out in `deltaw.train.run`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from deltaw.core import LoraConfig
from deltaw.errors import ConfigError, Fault, near
from deltaw.train.metrics import METRICS, SETS, expand

Metric = Callable[[Sequence[Any], Sequence[Any]], float]
"""A custom metric: (predictions, references) to one number, where higher is better."""

Task = Literal["causal-lm", "seq-cls"]
Schedule = Literal["linear", "cosine", "constant"]
_LATER = ("resume", "threads", "keep_checkpoints", "save_every", "samples")
"""Fields that may differ between a run and its resumption, since they do not change what is learned."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a training run.

    >>> TrainConfig(model="base/", data="rows.jsonl", out="adapter/").batch_size
    8
    """

    model: str
    """The base: a Hub id, a local folder, or a GGUF file."""
    data: str
    """Examples: a JSONL, JSON, CSV, TSV or Parquet file, a folder with train/valid/test, or a Hub data set id."""
    out: str
    """Folder to write the adapter, its checkpoints and its metrics to."""
    task: Task = "causal-lm"
    """causal-lm (answer by writing text) or seq-cls (choose one label)."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Which column of the data plays which role: {"prompt": "question", "completion": "answer"}."""
    max_length: int | None = None
    """Longest example in tokens, the rest is cut; by default 1024, or the base's limit where that is lower."""
    train_on: Literal["completion", "all"] = "completion"
    """Learn from the answers only, or from every token."""
    valid: str | float | None = None
    """Held-out data: a file, or a fraction of the data; by default the data's own valid part, else 0.1."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """The low-rank change to train."""
    name: str = "default"
    """Name of the adapter."""

    epochs: float = 1.0
    """Passes over the training data."""
    max_steps: int | None = None
    """Optimizer steps; overrides epochs."""
    batch_size: int = 8
    """Examples per forward pass. LoRA loses more than full fine-tuning from large batches."""
    batch_tokens: int | None = None
    """Most tokens of a batch; it then has as many examples as fit, up to batch_size."""
    group_by_length: bool = True
    """Make batches of examples of similar length, so that little is padded."""
    packing: Literal["auto", "off"] = "auto"
    """Lay a batch's examples end to end instead of padding them, where the base's attention keeps them apart."""
    grad_accumulation: int = 1
    """Forward passes per optimizer step; their loss is averaged over all supervised tokens of the step."""
    learning_rate: float = 5e-4
    """Peak rate: ten times the usual 5e-5 of full fine-tuning, where the optimum of LoRA was measured to lie."""
    schedule: Schedule = "linear"
    """The rate after warm-up: linear or cosine decay to zero, or constant."""
    warmup_ratio: float = 0.03
    """Share of the steps in which the rate rises from zero."""
    warmup_steps: int | None = None
    """Steps in which the rate rises from zero; overrides warmup_ratio."""
    weight_decay: float = 0.0
    """AdamW's decay of trained matrices; biases and norms are never decayed."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    eps: float = 1e-8
    """AdamW's term against division by zero."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """AdamW with float32 state, or with 8-bit state by bitsandbytes."""
    loraplus_lr_ratio: float = 1.0
    """LoRA+: the learning rate of B as a multiple of A's; 16 is usual."""
    freeze_a: bool = False
    """LoRA-FA: train B alone over a random A."""
    label_smoothing: float = 0.0
    """Share of each label's weight that is spread over the vocabulary."""
    z_loss: float = 0.0
    """Weight of the squared log-partition of the logits, which keeps them from drifting."""
    max_grad_norm: float = 1.0
    """Length to which the gradient is cut; 0 leaves it as it is."""

    device: str = "auto"
    """Where to compute: cpu, cuda, mps, or auto (a GPU where there is one)."""
    dtype: str = "auto"
    """Number format of the base: bf16, fp32, or auto (bf16 where the processor is fast at it)."""
    gradient_checkpointing: Literal["off", "layer", "attention"] = "off"
    """Save memory by computing activations twice: those of each layer, or of its attention only."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the base's layers; auto does it where the run is long enough and a measured step is faster."""
    threads: int | None = None
    """CPU threads; by default one for each core."""
    seed: int = 0
    """Seed of initialisation, data order and dropout."""

    eval_every: int | None = None
    """Steps between evaluations; by default five in a run, 0 for only before and after."""
    eval_rows: int | None = 200
    """Held-out rows to evaluate on, the first ones; None for all."""
    metrics: tuple[str | Metric, ...] = ()
    """exact_match, accuracy, f1, and the others that `deltaw eval` has; or a function of (predictions, references)."""
    max_new_tokens: int = 64
    """Longest answer, in tokens, that figures and samples generate."""
    samples: int = 3
    """Held-out examples answered before and after training, to look at."""
    keep_best: str | None = "loss"
    """Keep the adapter of the evaluation with the best of this: loss or a metric; None keeps the last."""
    early_stop: int | None = None
    """Stop after this many evaluations in a row without a better keep_best."""

    save_every: int | None = None
    """Steps between checkpoints; by default at each evaluation, 0 for none."""
    keep_checkpoints: int = 2
    """How many checkpoints to keep."""
    resume: bool = False
    """Go on from the last checkpoint in `out`, exactly as if the run had not stopped."""
    doctor_steps: int = 3
    """Steps within which every adapter tensor must get a gradient and move."""
    allow_unused: bool = False
    """Accept adapter tensors that no example reaches in these steps, such as those of rare experts."""

    def __post_init__(self) -> None:
        lora: Any = self.lora
        faults: list[Fault | str] = []
        if isinstance(lora, Mapping):
            try:
                object.__setattr__(self, "lora", LoraConfig.from_dict(lora))
            except ConfigError as error:
                faults.extend(error.faults)
        metrics: Any = self.metrics
        single = isinstance(metrics, str) or callable(metrics)
        object.__setattr__(self, "metrics", expand((metrics,) if single else tuple(metrics)))
        if isinstance(self.gradient_checkpointing, bool):
            object.__setattr__(self, "gradient_checkpointing", "layer" if self.gradient_checkpointing else "off")
        if isinstance(self.betas, Sequence):
            object.__setattr__(self, "betas", tuple(self.betas))
        if isinstance(self.columns, Mapping):
            object.__setattr__(self, "columns", dict(self.columns))
        faults.extend(_faults(self))
        if faults:
            raise ConfigError(*faults)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> TrainConfig:
        """The config with these options; unknown and missing keys are refused, all at once, with near matches."""
        known = {f.name for f in fields(cls)}
        lora_fields = {f.name for f in fields(LoraConfig)}
        faults = []
        for key in options:
            if key in lora_fields and key not in known:
                faults.append(Fault(f"TrainConfig option '{key}'", "is an option of the adapter", "it inside 'lora'"))
            elif key not in known:
                faults.append(Fault(f"TrainConfig option '{key}'", "is unknown", "an option of TrainConfig",
                                    near(key, [*sorted(known), *sorted(lora_fields)])))
        faults += [Fault(f"TrainConfig option '{key}'", "is missing", "a value")
                   for key in ("model", "data", "out") if key not in options]
        if faults:
            raise ConfigError(*faults)
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """All options as plain JSON values; a custom metric becomes its name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {"lora": self.lora.to_dict(), "columns": dict(self.columns), "betas": list(self.betas),
                   "metrics": [metric_name(metric) for metric in self.metrics]}
        return values

    def chosen_device(self) -> str:
        """The device that "auto" stands for on this machine."""
        if self.device != "auto":
            return self.device
        import torch  # here, so that the command line's help reads these fields without it

        return "cuda" if torch.cuda.is_available() else "cpu"

    def changes(self, recorded: Mapping[str, Any]) -> list[Fault]:
        """What differs from the config of the run to be resumed, except what may differ."""
        current = self.to_dict()
        names = [name for name in current if name not in _LATER and current[name] != recorded.get(name)]
        found = []
        for name in names:
            now, then = current[name], recorded.get(name)
            if name == "lora" and isinstance(then, Mapping):
                inner = [key for key in now if now[key] != then.get(key)]
                found += [Fault(f"TrainConfig.lora.{key}", f"got {now[key]!r}", _began_with(then.get(key)))
                          for key in inner]
            else:
                found.append(Fault(f"TrainConfig.{name}", f"got {now!r}", _began_with(then)))
        return found


def _began_with(value: object) -> str:
    return f"{value!r}, as when the run began"


def metric_name(metric: str | Metric) -> str:
    """The name under which a metric is reported."""
    return metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__)


class _Checks:
    """Gathers the faults of a config's values."""

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.faults = config, list[Fault]()

    def check(self, ok: bool, name: str, expected: str, remedy: str = "") -> None:
        """Note a fault of the field `name` unless it is `ok`."""
        if not ok:
            self.faults.append(Fault(f"TrainConfig.{name}", f"got {getattr(self.config, name)!r}", expected, remedy))

    def each(self, names: str, right: Callable[[Any], bool], expected: str) -> None:
        """Check several fields alike."""
        for name in names.split():
            self.check(right(getattr(self.config, name)), name, expected)

    def one_of(self, name: str, choices: Sequence[str]) -> None:
        """Check that the field is one of these words."""
        value = getattr(self.config, name)
        self.check(value in choices, name, "one of " + ", ".join(choices), near(str(value), choices))


def _faults(config: TrainConfig) -> list[Fault]:
    """All that is wrong with the values themselves, without a model or data."""
    checks = _Checks(config)
    checks.each("model data out name", lambda v: isinstance(v, str) and v != "", "a text that is not empty")
    checks.one_of("task", get_args(Task))
    checks.one_of("schedule", get_args(Schedule))
    checks.one_of("train_on", ("completion", "all"))
    checks.one_of("packing", ("auto", "off"))
    checks.one_of("compile", ("auto", "on", "off"))
    checks.one_of("optimizer", ("adamw", "adamw8bit"))
    checks.one_of("gradient_checkpointing", ("off", "layer", "attention"))
    if config.dtype in ("fp16", "float16"):
        checks.check(False, "dtype", "bf16 or fp32", "float16 overflows in training without loss scaling")
    else:
        checks.one_of("dtype", ("auto", "bf16", "fp32", "bfloat16", "float32"))
    checks.check(isinstance(config.device, str) and _is_device(config.device), "device", "auto, cpu, cuda or mps")
    checks.each("batch_size grad_accumulation max_new_tokens keep_checkpoints", lambda v: _whole(v, 1),
                "a whole number >= 1")
    checks.check(_whole(config.doctor_steps, 2), "doctor_steps", "a whole number >= 2",
                 "The A of a LoRA has a gradient from the second step on")
    checks.each("max_length max_steps batch_tokens threads early_stop eval_rows", lambda v: v is None or _whole(v, 1),
                "a whole number >= 1, or nothing")
    checks.each("eval_every save_every warmup_steps", lambda v: v is None or _whole(v, 0),
                "a whole number >= 0, or nothing")
    checks.each("samples seed", lambda v: _whole(v, 0), "a whole number >= 0")
    checks.each("epochs learning_rate eps loraplus_lr_ratio", lambda v: _number(v) and v > 0, "a number above 0")
    checks.each("weight_decay max_grad_norm z_loss", lambda v: _number(v) and v >= 0, "a number >= 0")
    checks.each("warmup_ratio label_smoothing", lambda v: _number(v) and 0 <= v < 1, "0 <= ratio < 1")
    checks.each("betas", lambda v: isinstance(v, tuple) and len(v) == 2 and all(_number(b) and 0 <= b < 1 for b in v),
                "two numbers, 0 <= beta < 1")
    checks.each("valid", lambda v: v is None or (_number(v) and 0 < v < 1) or (isinstance(v, str) and v != ""),
                "a file, 0 < fraction < 1, or nothing")
    checks.each("columns", lambda v: isinstance(v, dict), "a mapping of roles to columns")
    checks.each("lora", lambda v: isinstance(v, (LoraConfig, Mapping)), "a LoraConfig")
    checks.each("resume group_by_length allow_unused freeze_a", lambda v: isinstance(v, bool),
                "True or False")
    return checks.faults + _metric_faults(config)


def _metric_faults(config: TrainConfig) -> list[Fault]:
    """What is wrong with the metrics, and with what is judged by them."""
    faults = [Fault("TrainConfig.metrics", f"got {metric!r}", "of " + ", ".join(METRICS) + ", or a function",
                    near(str(metric), (*METRICS, *SETS)))
              for metric in config.metrics if not callable(metric) and metric not in METRICS]
    # METEOR is reported under another name where WordNet is missing, which is known only when it is computed.
    measured = ["loss", *(metric_name(m) for m in config.metrics if m != "meteor")]
    if config.keep_best is not None and config.keep_best not in measured:
        faults.append(Fault("TrainConfig.keep_best", f"got {config.keep_best!r}", "one of " + ", ".join(measured),
                            near(str(config.keep_best), measured) or "Name it in metrics too"))
    if config.early_stop is not None and (config.keep_best is None or config.eval_every == 0):
        faults.append(Fault("TrainConfig.early_stop", f"got {config.early_stop!r}",
                            "evaluations and a keep_best to judge by", "Set eval_every and keep_best"))
    return faults


def _is_device(name: str) -> bool:
    return re.fullmatch(r"auto|(cpu|cuda|mps|xpu)(:\d+)?", name) is not None


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
