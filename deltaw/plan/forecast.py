"""One way of tuning on one base and device: parameters, peaks, files and time at any batch, length and rank.

The network without values is run at two lengths; between and beyond, what a step keeps is c₁·tokens + c₂·tokens·length
(masks grow with the square), so that a search costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from deltaw.bases.heads import head_modules
from deltaw.bases.quantize import linear_layers, stored_quantization
from deltaw.inject import Target
from deltaw.plan import counts, memory
from deltaw.plan.calibrate import Rates
from deltaw.plan.config import Method, PlanConfig
from deltaw.plan.devices import Device
from deltaw.plan.memory import Memory, Phase, Sizes
from deltaw.plan.shapes import Shapes
from deltaw.plan.step import Steps
from deltaw.plan.timing import (
    FAULTS,
    TRIMMED,
    optimizer_seconds,
    seconds_elsewhere,
    seconds_here,
    step_work,
    unpacking_seconds,
)


@dataclass(frozen=True, slots=True)
class At:
    """What is varied in a search."""

    batch: int
    length: int
    rank: int
    adapters: int = 1


class Setting:
    """A base, a device and a config: what all ways of tuning share."""

    def __init__(self, config: PlanConfig, shapes: Shapes, device: Device, dtype: torch.dtype,
                 rates: Rates | None) -> None:
        self.config, self.shapes, self.device, self.dtype, self.rates = config, shapes, device, dtype, rates
        self.item = memory.item_size(dtype)
        self.steps = Steps(shapes, config, dtype)
        self.quadratic: float | None = None
        """Bytes that a token keeps for each token of its example, once they are known."""
        self.gpu = device.kind == "gpu"

    @cached_property
    def model(self) -> nn.Module:
        """The whole network, without values."""
        return self.shapes.skeleton(self.config.task, self.dtype)

    @cached_property
    def dims(self) -> counts.Dimensions:
        """The sizes that closed forms take."""
        return counts.Dimensions.of(self.shapes.config)

    @cached_property
    def targets(self) -> list[Target]:
        """Where the low-rank change goes."""
        return counts.low_rank(self.model, self.config.lora, self.config.task)

    @cached_property
    def weights(self) -> int:
        """Bytes of the base."""
        return sum(t.numel() * t.element_size() for t in [*self.model.parameters(), *self.model.buffers()])

    @cached_property
    def largest_tensor(self) -> int:
        """Values of the base's largest tensor."""
        return max(t.numel() for t in self.model.parameters())

    @cached_property
    def values(self) -> int:
        """Values of the base, a tied one once."""
        return counts.full(self.model)

    @cached_property
    def head(self) -> int:
        """Values of a classifier's head."""
        return counts.heads(self.model, self.config.task)

    @cached_property
    def biases(self) -> int:
        """Values that BitFit trains."""
        return counts.bitfit(self.model, self.config.task)

    @cached_property
    def linears(self) -> list[int]:
        """Sizes of the matrices that a quantizer takes: linear layers that are no output layer."""
        model: Any = self.model
        heads = head_modules(model)
        output = model.get_output_embeddings()
        return [layer.weight.numel() for name, layer in linear_layers(model).items() if layer is not output
                and not any(name == head or name.startswith(head + ".") for head in heads)] or [0]

    @cached_property
    def packed(self) -> float | None:
        """Bytes of the linear layers where the base's files hold them quantized: all that is not a plain number."""
        if stored_quantization(self.shapes.config) is None:
            return None
        stated = self.shapes.config.dtype
        plain = (2 if stated is None else stated.itemsize) * (self.values - sum(self.linears))
        return float(max(0, self.shapes.stored_bytes - plain))

    @property
    def held(self) -> int:
        """Bytes of the base as it is before a way of tuning packs it."""
        plain = 0 if self.packed is None else sum(self.linears) * self.item
        return round(self.weights - plain + (self.packed or 0.0))


class Forecast:
    """One way of tuning in a setting."""

    def __init__(self, setting: Setting, method: Method) -> None:
        self.setting, self.method = setting, method
        self._sizes: dict[int, Sizes] = {}

    @property
    def framework(self) -> float:
        """What is held before a weight is."""
        setting, config = self.setting, self.setting.config
        packed = memory.packed_bytes(self.sizes(config.lora.r), config, self.method)
        here = memory.FRAMEWORK_CPU + (memory.LIBRARY_CPU if packed is not None else 0)
        return float(config.resident or (memory.FRAMEWORK_GPU if setting.gpu else here))

    def trained(self, rank: int) -> int:
        """Trained values, a classifier's head among them."""
        setting, method, config = self.setting, self.method, self.setting.config
        head, dims = setting.head, setting.dims
        match method:
            case "lora" | "qlora":
                return sum(t.site.geometry.count(t.rank * rank // config.lora.r if t.rank else 0)
                           for t in setting.targets)
            case "full":
                return setting.values if setting.packed is None else 0
            case "bitfit":
                return setting.biases
            case "preembed":
                return counts.prompt(dims, config.virtual_tokens) + head
            case "prelayer":
                return counts.prelayer(dims, config.virtual_tokens) + head
            case "adapter-h":
                return counts.houlsby(dims, config.bottleneck) + head
            case "adapter-l":
                return counts.lin(dims, config.bottleneck) + head
            case "adapter-p":
                return counts.pfeiffer(dims, config.bottleneck) + head

    def sizes(self, rank: int) -> Sizes:
        """What does not depend on the batch."""
        if rank not in self._sizes:
            self._sizes[rank] = self._weighed(rank)
        return self._sizes[rank]

    def _weighed(self, rank: int) -> Sizes:
        setting, config = self.setting, self.setting.config
        shapes, inside = setting.shapes, self.method in ("full", "bitfit")
        text = shapes.config.get_text_config()
        vocabulary, width = int(text.vocab_size), setting.dims.width
        return Sizes(
            weights=setting.weights, matrices=sum(setting.linears), largest=max(setting.linears),
            largest_tensor=setting.largest_tensor, vocabulary=vocabulary, width=width,
            trained=self.trained(rank), trained_width=setting.item if inside else 4, inside=inside,
            trained_head=vocabulary * width if self.method == "full" and config.task == "causal-lm" else 0,
            packed=setting.packed, stored=shapes.stored_bytes, recast=shapes.stored_dtype not in (None, setting.dtype))

    def kept(self, at: At) -> float:
        """Bytes of activations when the forward is done."""
        config, steps = self.setting.config, self.setting.steps
        b, n = config.batch_size, config.max_length
        first = steps.at(self.method, b, n).kept
        if at.batch != b or at.length != n:
            c2 = self._quadratic()
            first = at.batch * at.length * (first / (b * n) + c2 * (at.length - n))
        tokens, item = at.batch * at.length, self.setting.item
        if self.method in ("lora", "qlora"):
            first += (at.rank - config.lora.r) * tokens * item * sum(1 for t in self.setting.targets if t.rank)
        layers = {"adapter-h": 2, "adapter-l": 1, "adapter-p": 1}.get(self.method, 0) * self.setting.dims.layers
        return first + layers * tokens * item * (self.setting.dims.width + 2 * config.bottleneck)

    def _quadratic(self) -> float:
        """c₂, of masks, which are the same in all ways of tuning: worked out for the first that asks."""
        setting, config = self.setting, self.setting.config
        if setting.quadratic is None:
            b, n, half = config.batch_size, config.max_length, max(2, config.max_length // 2)
            first, second = (setting.steps.at(self.method, b, length).kept for length in (n, half))
            setting.quadratic = max(0.0, (first / n - second / half) / b / (n - half)) if n > half else 0.0
        return setting.quadratic

    def peak(self, phase: Phase, at: At | None = None) -> Memory:
        """The most that this phase of a run holds."""
        setting, config = self.setting, self.setting.config
        at = at or self.asked
        sizes, item, framework = self.sizes(at.rank), setting.item, self.framework
        if at.adapters != config.adapters:
            config = replace(config, adapters=at.adapters)
        if phase == "merge":
            return memory.merging(sizes, item)
        if phase == "load":
            return memory.loading(sizes, config, self.method, item, framework, gpu=setting.gpu)
        if phase == "save":
            return memory.saving(sizes, config, self.method, item, framework, gpu=setting.gpu)
        step = setting.steps.at(self.method, config.batch_size, config.max_length)
        share = at.batch * at.length / config.tokens
        if phase == "evaluate":
            cache = 2 * setting.dims.layers * setting.dims.keys * item * at.batch * (at.length + config.max_new_tokens)
            return memory.evaluation(sizes, config, self.method, item, framework, forward=step.forward * share,
                                     cache=float(cache), batch=at.batch, length=at.length, gpu=setting.gpu)
        return memory.training(sizes, config, self.method, item, framework, kept=self.kept(at),
                               over=step.over * share, batch=at.batch, length=at.length, gpu=setting.gpu)

    def worst(self, at: At | None = None) -> tuple[Phase, Memory]:
        """The phase of a training run that holds most."""
        phases: tuple[Phase, ...] = ("train", "evaluate", "save", "load")
        found: dict[Phase, Memory] = {phase: self.peak(phase, at) for phase in phases}
        most = max(phases, key=lambda phase: found[phase].total)
        return most, found[most]

    @property
    def asked(self) -> At:
        """The config's own point."""
        config = self.setting.config
        return At(config.batch_size, config.max_length, config.lora.r, config.adapters)

    def step_seconds(self) -> float | None:
        """Seconds of an optimizer step, an average one; None where this machine was not measured."""
        setting, config = self.setting, self.setting.config
        if setting.device.here and setting.rates is None:
            return None
        step = setting.steps.at(self.method, config.batch_size, config.max_length)
        sizes = self.sizes(config.lora.r)
        work = step_work(step.work, sizes, config, config.batch_size, config.max_length)
        if setting.rates is not None:
            pass_ = seconds_here(work, setting.rates, setting.item)
            pass_ *= _touching_again(config) if not setting.gpu else 1.0
        else:
            pass_ = seconds_elsewhere(work, setting.device, _NAMES[setting.dtype])
        pass_ *= (config.mean_tokens or config.tokens) / config.tokens
        packed = memory.packed_bytes(sizes, config, self.method)
        if packed is not None:
            pass_ += unpacking_seconds(sizes, packed, config, setting.item, setting.device, setting.rates)
        updates = config.updates or config.adapters
        return config.grad_accumulation * pass_ + updates * optimizer_seconds(sizes, setting.device, setting.rates)


def _touching_again(config: PlanConfig) -> float:
    """How much longer a pass takes on a CPU whose memory is new again and again."""
    if config.gradient_checkpointing != "off":
        return FAULTS
    return TRIMMED if config.release_memory else 1.0


_NAMES: Mapping[torch.dtype, str] = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
