"""One way of tuning on one base and device: parameters, peaks, files and time at any batch, length and rank.

The network without values is run at two lengths; between and beyond, what a step keeps is c₁·tokens + c₂·tokens·length
(masks grow with the square), so that a search costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from deltaw.plan import counts, memory
from deltaw.plan.config import Method, PlanConfig
from deltaw.plan.devices import Device
from deltaw.plan.found import Network, Place, Work
from deltaw.plan.memory import Memory, Phase, Sizes
from deltaw.plan.shapes import Shapes
from deltaw.plan.timing import (
    FAULTS,
    TRIMMED,
    evaluation_work,
    optimizer_seconds,
    seconds_elsewhere,
    seconds_here,
    step_work,
    unpacking_seconds,
)
from deltaw.plan.walks import Walks

if TYPE_CHECKING:
    from deltaw.plan.calibrate import Rates


@dataclass(frozen=True, slots=True)
class At:
    """What is varied in a search."""

    batch: int
    length: int
    rank: int
    adapters: int = 1


class Setting:
    """A base, a device and a config: what all ways of tuning share."""

    def __init__(self, config: PlanConfig, shapes: Shapes, device: Device, dtype: str, rates: Rates | None) -> None:
        self.config, self.shapes, self.device, self.dtype, self.rates = config, shapes, device, dtype, rates
        self.item = memory.item_size(dtype)
        self.walks = Walks(shapes, config, dtype)
        self.quadratic: float | None = None
        """Bytes that a token keeps for each token of its example, once they are known."""
        self.gpu = device.kind == "gpu"

    @property
    def network(self) -> Network:
        """What the base weighs."""
        return self.walks.network

    @property
    def places(self) -> tuple[Place, ...]:
        """Where the low-rank change goes."""
        return self.walks.places

    @property
    def packed(self) -> float | None:
        """Bytes of the linear layers where the base's files hold them quantized: all that is not a plain number."""
        base = self.network
        if base.quantized is None:
            return None
        return float(max(0, self.shapes.stored_bytes - base.stated_item * (base.values - base.matrices)))

    @property
    def is_timed(self) -> bool:
        """Whether there are rates to tell times by: those of a data sheet, or what was measured of this machine."""
        return not self.device.here or self.rates is not None

    @property
    def has_kernels(self) -> bool:
        """Whether steps run on kernels in C."""
        return self.rates is not None and self.rates.has_kernels and not self.gpu

    def seconds(self, work: Work) -> float:
        """What this work takes."""
        if self.rates is not None:
            return seconds_here(work, self.rates, self.item) * (1.0 if self.gpu else _touching_again(self.config))
        return seconds_elsewhere(work, self.device, _NAMES[self.dtype])

    @property
    def held(self) -> int:
        """Bytes of the base as it is before a way of tuning packs it."""
        plain = 0 if self.packed is None else self.network.matrices * self.item
        return round(self.network.weights - plain + (self.packed or 0.0))


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
        head, dims = setting.network.head, setting.network.dims
        match method:
            case "lora" | "qlora":
                return sum(place.count(place.rank * rank // config.lora.r) for place in setting.places)
            case "full":
                return setting.network.values if setting.packed is None else 0
            case "bitfit":
                return setting.network.biases
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

    def drawn(self, rank: int) -> int:
        """Values of the factors that stay as they were drawn."""
        places = self.setting.places if self.method in ("lora", "qlora") else ()
        return sum(place.drawn * (place.rank * rank // self.setting.config.lora.r) for place in places)

    def sizes(self, rank: int) -> Sizes:
        """What does not depend on the batch."""
        if rank not in self._sizes:
            self._sizes[rank] = self._weighed(rank)
        return self._sizes[rank]

    def _weighed(self, rank: int) -> Sizes:
        setting, config = self.setting, self.setting.config
        shapes, inside, base = setting.shapes, self.method in ("full", "bitfit"), setting.network
        vocabulary, width = base.vocabulary, base.dims.width
        packs = self.method == "qlora" and setting.packed is None and config.quantize_tables != "none"
        return Sizes(
            weights=base.weights, matrices=base.matrices, largest=base.largest_matrix,
            largest_tensor=base.largest_tensor, vocabulary=vocabulary, width=width,
            trained=self.trained(rank), drawn=self.drawn(rank), trained_width=setting.item if inside else 4,
            inside=inside,
            trained_head=vocabulary * width if self.method == "full" and config.task == "causal-lm" else 0,
            packed=setting.packed, tables=base.tables if packs else 0, table_rows=base.table_rows if packs else 0,
            stored=shapes.stored_bytes, recast=shapes.stored_dtype not in (None, setting.dtype))

    def kept(self, at: At) -> float:
        """Bytes of activations when the forward is done."""
        config, walks = self.setting.config, self.setting.walks
        b, n = config.batch_size, config.max_length
        first = walks.at(self.method, b, n).kept
        if at.batch != b or at.length != n:
            c2 = self._quadratic()
            first = at.batch * at.length * (first / (b * n) + c2 * (at.length - n))
        tokens, item = at.batch * at.length, self.setting.item
        if self.method in ("lora", "qlora"):
            first += (at.rank - config.lora.r) * tokens * item * sum(1 for place in self.setting.places if place.rank)
        layers = {"adapter-h": 2, "adapter-l": 1, "adapter-p": 1}.get(self.method, 0) * self.setting.network.dims.layers
        return first + layers * tokens * item * (self.setting.network.dims.width + 2 * config.bottleneck)

    def _quadratic(self) -> float:
        """c₂, of masks, which are the same in all ways of tuning: worked out for the first that asks."""
        setting, config = self.setting, self.setting.config
        if setting.quadratic is None:
            b, n, half = config.batch_size, config.max_length, max(2, config.max_length // 2)
            first, second = (setting.walks.at(self.method, b, length).kept for length in (n, half))
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
        step = setting.walks.at(self.method, config.batch_size, config.max_length)
        share = at.batch * at.length / config.tokens
        if phase == "evaluate":
            dims = setting.network.dims
            cache = 2 * dims.layers * dims.keys * item * at.batch * (at.length + config.max_new_tokens)
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
        if not setting.is_timed:
            return None
        step = setting.walks.at(self.method, config.batch_size, config.max_length, kernels=setting.has_kernels)
        sizes = self.sizes(config.lora.r)
        work = step_work(step.work, sizes, config, config.batch_size, config.max_length, kernels=setting.has_kernels)
        share = (config.mean_tokens or config.tokens) / config.tokens
        pass_ = setting.seconds(work) * share + self._unpacking(None)
        updates = config.updates or config.adapters
        update = optimizer_seconds(sizes, config, setting.device, setting.rates, tensors=self.tensors)
        return config.grad_accumulation * pass_ + updates * update

    def evaluation_seconds(self) -> float | None:
        """Seconds of the loss of all held-out examples, once; None where they, or this machine's rates, are unknown."""
        setting, config = self.setting, self.setting.config
        if not setting.is_timed or config.eval_rows is None:
            return None
        step = setting.walks.at(self.method, config.batch_size, config.max_length)
        work = evaluation_work(step.forward_work, self.sizes(config.lora.r), config, config.batch_size,
                               config.max_length, kernels=setting.has_kernels)
        share = (config.mean_tokens or config.tokens) / config.tokens
        return config.eval_rows / config.batch_size * (setting.seconds(work) * share + self._unpacking(1))

    def _unpacking(self, times: int | None) -> float:
        """Seconds of unpacking the base in a pass, where it is packed; `times` as `unpacking_seconds` has it."""
        setting, config = self.setting, self.setting.config
        sizes = self.sizes(config.lora.r)
        packed = memory.packed_bytes(sizes, config, self.method)
        return 0.0 if packed is None else unpacking_seconds(
            sizes, packed, config, setting.item, setting.device, setting.rates, times=times)

    @property
    def tensors(self) -> int:
        """Trained tensors: the two factors of each site; of another way of tuning its layers, which is near enough."""
        places = self.setting.places if self.method in ("lora", "qlora") else ()
        return sum(1 if place.drawn or not place.rank else 2 for place in places) or self.setting.network.dims.layers


def _touching_again(config: PlanConfig) -> float:
    """How much longer a pass takes on a CPU whose memory is new again and again."""
    if config.gradient_checkpointing != "off":
        return FAULTS
    return TRIMMED if config.release_memory else 1.0


_NAMES: Mapping[str, str] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
