"""`TrainConfig`: one training run as a value: base, data, the change to train, and how.

Frozen and checked when it is made; every fault is named at once. The docstring line under each field is also the
command line's help. What values may be is checked in `deltaw.train.config_checks`; what depends on the data (numbers of
steps) is worked out in `deltaw.train.run`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from deltaw.baselines.config import BaselineConfig, Method
from deltaw.core import LoraConfig
from deltaw.errors import ConfigError, Fault, near
from deltaw.train.config_checks import faults_of
from deltaw.train.figures import Metric, metric_name
from deltaw.train.metrics import expand

Task = Literal["causal-lm", "seq-cls"]
Schedule = Literal["linear", "cosine", "constant"]
_LATER = ("name", "resume", "threads", "keep_checkpoints", "save_every", "samples", "cache_data", "plan",
          "release_memory")
"""Fields that may differ between a run and its resumption, since they do not change what is learned."""
_INNER: Mapping[str, type[LoraConfig] | type[BaselineConfig]] = {"lora": LoraConfig, "baseline": BaselineConfig}
"""Fields that are configs themselves."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a training run.

    >>> TrainConfig(model="base/", data="rows.jsonl", out="adapter/").batch_size
    8
    """

    model: str
    """The base: a Hub id, a local folder, or a GGUF file."""
    data: str
    """Examples: a JSONL, JSON, CSV, TSV, Parquet or plain text file, a folder with train/valid/test, or a Hub data set
    id."""
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
    cache_data: bool = True
    """Keep the tokens of larger data files in DELTAW_HOME, where the next run over the same data finds them."""
    method: Method = "lora"
    """What is trained: lora, or to compare it with full, ft-top-k, head, bitfit, preembed, prelayer, adapter-h,
    adapter-l, adapter-p, adapter-d, lora+pe, lora+pl or subspace."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """The low-rank change to train."""
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    """Options of the other methods."""
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
    quantize: Literal["none", "nf4", "fp4", "int8"] = "none"
    """Store the base's linear layers in 4 or 8 bits while it is loaded (QLoRA): nf4, fp4 or int8."""
    double_quant: bool = True
    """With nf4 and fp4, pack the scales of the blocks too."""
    quantize_tables: Literal["none", "int8"] = "none"
    """With quantize, store the embedding and the output layer too: int8, one scale for each row."""
    gradient_checkpointing: Literal["off", "layer", "attention"] = "off"
    """Save memory by computing activations twice: those of each layer, or of its attention only."""
    release_memory: bool = False
    """Give freed memory back to the system after each step: less is held at the peak, each step is a little slower."""
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
    plan: Literal["refuse", "warn", "off"] = "refuse"
    """Plan the run first, and refuse one that cannot fit in memory, only warn of it, or do not look."""

    def __post_init__(self) -> None:
        faults: list[Fault | str] = []
        for name, kind in _INNER.items():
            value: Any = getattr(self, name)
            if isinstance(value, Mapping):
                try:
                    object.__setattr__(self, name, kind.from_dict(value))
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
        faults.extend(faults_of(self))
        if faults:
            raise ConfigError(*faults)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> TrainConfig:
        """The config with these options; unknown and missing keys are refused, all at once, with near matches."""
        known = {f.name for f in fields(cls)}
        inner = {f.name: name for name, kind in _INNER.items() for f in fields(kind)}
        faults = []
        for key in options:
            if key in inner and key not in known:
                whose = "the adapter" if inner[key] == "lora" else "another method"
                faults.append(Fault(f"TrainConfig option '{key}'", f"is an option of {whose}",
                                    f"it inside '{inner[key]}'"))
            elif key not in known:
                faults.append(Fault(f"TrainConfig option '{key}'", "is unknown", "an option of TrainConfig",
                                    near(key, [*sorted(known), *sorted(inner)])))
        faults += [Fault(f"TrainConfig option '{key}'", "is missing", "a value")
                   for key in ("model", "data", "out") if key not in options]
        if faults:
            raise ConfigError(*faults)
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """All options as plain JSON values; a custom metric becomes its name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {name: getattr(self, name).to_dict() for name in _INNER}
        values |= {"columns": dict(self.columns), "betas": list(self.betas),
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
            if name in _INNER and isinstance(then, Mapping):
                inner = [key for key in now if now[key] != then.get(key)]
                found += [Fault(f"TrainConfig.{name}.{key}", f"got {now[key]!r}", _began_with(then.get(key)))
                          for key in inner]
            else:
                found.append(Fault(f"TrainConfig.{name}", f"got {now!r}", _began_with(then)))
        return found


def _began_with(value: object) -> str:
    return f"{value!r}, as when the run began"
