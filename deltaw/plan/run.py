"""`plan`: parameters, memory and time of each way of tuning, before a weight is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from deltaw.errors import BaseModelError
from deltaw.plan import memory
from deltaw.plan.config import Method, PlanConfig, parse_memory
from deltaw.plan.devices import BANDWIDTH_SHARE, COMPUTE_SHARE, Device, find_device
from deltaw.plan.fit import cheapest_change, largest
from deltaw.plan.forecast import Forecast, Setting
from deltaw.plan.memory import Memory, Phase
from deltaw.plan.shapes import read_shapes

if TYPE_CHECKING:
    from deltaw.plan.calibrate import Rates


@dataclass(frozen=True, kw_only=True)
class MethodPlan:
    """What one way of tuning needs."""

    method: Method
    parameters: int
    """Trained values, exactly."""
    sites: Mapping[str, int] = field(default_factory=dict)
    """Trained values of each site of a low-rank change."""
    memory: Mapping[Phase, Memory] = field(default_factory=dict)
    """The peak of each phase by part; empty where a step of this base cannot be followed."""
    adapter_bytes: int
    """The file of what was trained."""
    checkpoint_bytes: int
    """A checkpoint to resume from."""
    step_seconds: float | None = None
    """An optimizer step of average length; None where this machine was not measured."""
    evaluation_seconds: float | None = None
    """The loss of the held-out examples, once, where their number is known."""
    total_seconds: float | None = None
    """All steps of the run, where their number is known, and its evaluations; answers and checkpoints come on top."""
    fits: bool | None = None
    """Whether a run stays within the device's memory."""
    binds: str = ""
    """The part of the peak that takes most, and its phase."""
    largest: Mapping[str, int] = field(default_factory=dict)
    """The largest rank, batch, length and number of adapters that fit, each with the others as asked."""
    change: str = ""
    """Where it does not fit: the cheapest change that makes it."""

    @property
    def peak(self) -> int:
        """Bytes of the highest phase of training."""
        return max((m.total for phase, m in self.memory.items() if phase != "merge"), default=0)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"method": self.method, "parameters": self.parameters, "sites": dict(self.sites),
                "memory": {phase: m.to_dict() for phase, m in self.memory.items()}, "peak": self.peak,
                "adapter_bytes": self.adapter_bytes, "checkpoint_bytes": self.checkpoint_bytes,
                "step_seconds": self.step_seconds, "evaluation_seconds": self.evaluation_seconds,
                "total_seconds": self.total_seconds, "fits": self.fits,
                "binds": self.binds, "largest": dict(self.largest), "change": self.change}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The answer."""

    config: PlanConfig
    parameters: int
    """Values of the base."""
    weights: int
    """Bytes of the base in its number format, packed ones where its files hold them so."""
    dtype: str
    device: Device
    methods: tuple[MethodPlan, ...]
    notes: tuple[str, ...] = ()
    """What the figures rest on."""

    def __getitem__(self, method: str) -> MethodPlan:
        return next(m for m in self.methods if m.method == method)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        device = {"name": self.device.name, "kind": self.device.kind, "memory": self.device.memory}
        return {"model": self.config.model, "parameters": self.parameters, "weights": self.weights,
                "dtype": self.dtype, "device": device, "config": self.config.to_dict(),
                "methods": [m.to_dict() for m in self.methods], "notes": list(self.notes)}


def plan(config: PlanConfig, *, search: bool = True, calibrates: bool = False) -> Plan:
    """What each way of tuning needs on the config's device; no weight is loaded.

    `search` looks for the largest values that fit, and for a change where a run does not. `calibrates` measures this
    machine first, which takes under two minutes, once. Raises ConfigError and BaseModelError with all that is wrong.
    """
    limit = None if config.memory is None else parse_memory(config.memory)
    device = find_device(config.device, limit)
    shapes = read_shapes(config.model, task=config.task, num_labels=config.num_labels)
    dtype = _dtype(config, device)
    rates = _rates(config, device, dtype, calibrates)
    setting = Setting(config, shapes, device, dtype, rates)
    methods = tuple(_method(Forecast(setting, method), search=search) for method in config.methods)
    return Plan(config=config, parameters=setting.network.values, weights=setting.held,
                dtype=dtype, device=device, methods=methods,
                notes=tuple(_notes(setting, methods)))


def loading(config: PlanConfig) -> tuple[Memory, Device]:
    """What bringing the base in takes at its peak, as the first method holds it, and the device; nothing is run."""
    device = find_device(config.device)
    shapes = read_shapes(config.model, task=config.task, num_labels=config.num_labels)
    setting = Setting(config, shapes, device, _dtype(config, device), None)
    return Forecast(setting, config.methods[0]).peak("load"), device


def _dtype(config: PlanConfig, device: Device) -> str:
    """The number format of the base: "bfloat16", "float16" or "float32"."""
    if config.dtype == "auto" and not device.here and device.tflops is not None:
        return "bfloat16" if "bf16" in device.tflops else "float16"
    if config.dtype != "auto":
        return _FORMATS.get(config.dtype, config.dtype)
    from deltaw.bases import choose_dtype

    return str(choose_dtype("auto", "cpu" if device.kind == "cpu" else "cuda")[0]).removeprefix("torch.")


_FORMATS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def _rates(config: PlanConfig, device: Device, dtype: str, calibrates: bool) -> Rates | None:
    if not device.here:
        return None
    import torch

    from deltaw.plan.calibrate import calibrate, known_rates

    threads = config.threads or int(os.environ.get("OMP_NUM_THREADS") or 0) or torch.get_num_threads()
    return (calibrate if calibrates else known_rates)(getattr(torch, dtype), threads)


def _method(forecast: Forecast, *, search: bool) -> MethodPlan:
    """One column; of a base whose step cannot be followed, the counts and files alone."""
    setting, config = forecast.setting, forecast.setting.config
    sizes = forecast.sizes(config.lora.r)
    places = setting.places if forecast.method in ("lora", "qlora") else ()
    sites = {place.name: place.count(place.rank) for place in places}
    files: dict[str, Any] = {"adapter_bytes": memory.adapter_bytes(sizes),
                             "checkpoint_bytes": memory.checkpoint_bytes(sizes, config)}
    counted = MethodPlan(method=forecast.method, parameters=sizes.trained, sites=sites, **files)
    if not sizes.trained:
        return counted
    try:
        merges = forecast.method in ("lora", "qlora")  # what other ways train is in the base already, or stays apart
        peaks = {phase: forecast.peak(phase) for phase in memory.PHASES if merges or phase != "merge"}
    except BaseModelError:
        return counted
    phase, worst = forecast.worst()
    step, evaluation, steps = forecast.step_seconds(), forecast.evaluation_seconds(), config.steps
    total = None if step is None or steps is None else step * steps + config.evaluations * (evaluation or 0.0)
    fits = worst.total <= setting.device.memory
    return MethodPlan(
        method=forecast.method, parameters=sizes.trained, sites=sites, memory=peaks, step_seconds=step,
        evaluation_seconds=evaluation, total_seconds=total, fits=fits,
        binds=f"{worst.largest} ({phase})", largest=largest(forecast) if search else {},
        change=cheapest_change(forecast) if search and not fits else "", **files)


def _notes(setting: Setting, methods: tuple[MethodPlan, ...]) -> list[str]:
    """What the figures rest on, for people."""
    device, found = setting.device, []
    if not device.here:
        found.append(f"time on {device.name} is an estimate: its {device.source}'s rates times {COMPUTE_SHARE:.0%} "
                     f"(products) and {BANDWIDTH_SHARE:.0%} (memory)")
        if device.name.startswith("m") and device.name[1:2].isdigit():
            found.append(f"{device.name} is sold with several sizes of memory: give its own with --memory")
    elif setting.rates is None:
        found.append("time is not known: measure this machine once with `deltaw plan --calibrate` (under two minutes)")
    if setting.shapes.gguf is not None:
        found.append("a GGUF file is converted once before it is first used; that takes its float32 size in memory")
    if any(m.parameters and not m.memory for m in methods):
        found.append("a step of this base cannot be followed without data: its parameters are counted, its memory "
                     "is not known")
    base = setting.network
    if base.quantized is not None:
        found.append(f"the base is quantized already ({base.quantized}) and stays so: qlora is lora here, and the "
                     "packed values cannot be trained")
    if base.positions is not None and setting.config.max_length > base.positions:
        found.append(f"the base takes {base.positions:,} tokens; training refuses a larger max_length")
    idle = [m.method for m in methods if not m.parameters]
    if idle:
        found.append(f"{', '.join(idle)}: this base has nothing for it to train")
    return found
