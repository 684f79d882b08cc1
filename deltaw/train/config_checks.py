"""What is wrong with the values of a `TrainConfig`: all of it at once, without a model or data."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from deltaw.baselines.config import OPTIONS, BaselineConfig, trains_lora
from deltaw.core import LoraConfig
from deltaw.core.formats import tables_alone
from deltaw.errors import Fault, near
from deltaw.train.figures import metric_name
from deltaw.train.metrics import METRICS, SETS

if TYPE_CHECKING:
    from deltaw.train.config import TrainConfig


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


def faults_of(config: TrainConfig) -> list[Fault]:
    """All that is wrong with the values themselves, without a model or data."""
    checks = _Checks(config)
    checks.each("model data out name", lambda v: isinstance(v, str) and v != "", "a text that is not empty")
    for name, hint in get_type_hints(type(config)).items():
        if hint is bool:
            checks.each(name, lambda v: isinstance(v, bool), "True or False")
        elif get_origin(hint) is Literal:
            checks.one_of(name, get_args(hint))
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
    checks.each("baseline", lambda v: isinstance(v, (BaselineConfig, Mapping)), "a BaselineConfig")
    alone = tables_alone("TrainConfig.quantize_tables", config.quantize, config.quantize_tables)
    checks.faults += [alone] if alone is not None else []
    return checks.faults + _method_faults(config) + _metric_faults(config)


def _method_faults(config: TrainConfig) -> list[Fault]:
    """What does not go with the method that is trained."""
    if config.method not in OPTIONS or not isinstance(config.baseline, BaselineConfig):
        return []
    found = config.baseline.faults(config.method)
    for name, default in (("lora", LoraConfig()), ("freeze_a", False), ("loraplus_lr_ratio", 1.0)):
        alone = name != "freeze_a" or config.method == "lora"
        if getattr(config, name) != default and not (trains_lora(config.method) and alone):
            found.append(Fault(f"TrainConfig.{name}", f"is given for method {config.method}", "a method with LoRA",
                               "Leave it out"))
    if config.baseline.prefix_form == "past" and config.gradient_checkpointing != "off":
        found.append(Fault("TrainConfig.gradient_checkpointing", f"got {config.gradient_checkpointing!r}",
                           "off with prefix_form past", "A layer that is computed again would lose the prefix; use "
                           "prefix_form activations"))
    return found


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
