"""Peak memory, in parts: of training, evaluation, saving, merging and loading.

    training = framework + weights + adapters + gradients + optimizer + activations + logits + allocator

`framework` is what a process holds before it has a weight: interpreter, torch, transformers, the data's libraries, and
on a GPU its context. Activations and gradients are those that `step` finds; logits exist in stretches
(`deltaw.train.cross_entropy`). `allocator` is what freed memory costs that is not given back: a share of what comes
and goes, set on measured runs (`benchmarks/plan_accuracy.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from deltaw.core.stretches import GPU_STRIP, STRIP, rows_of_a_strip, stretch_of
from deltaw.plan.config import Method, PlanConfig

Phase = Literal["train", "evaluate", "save", "merge", "load"]
PHASES: tuple[Phase, ...] = ("train", "evaluate", "save", "merge", "load")
PARTS = ("framework", "weights", "adapters", "gradients", "optimizer", "activations", "logits", "allocator")

FRAMEWORK_CPU = 450 << 20
"""Resident before a weight is: libraries, tokenizer, data, and what torch imports and prepares in its first step."""
FRAMEWORK_MERGE = 400 << 20
"""The same of `deltaw merge`, which reads no data and takes no step."""
LIBRARY_CPU = 60 << 20
"""bitsandbytes and what it imports."""
HOLES_CPU = 50 << 20
"""Holes that loading and preparing leave in a heap which is not given back."""
FRAMEWORK_GPU = 810 << 20
"""A CUDA context (745 MiB on an H100) and cuBLAS's workspaces, of 32 MiB, of the threads that run the two passes; the
host's memory is not counted against the card."""
RETAINED_CPU, RETAINED_GPU = 0.19, 0.05
"""Share of what comes and goes that an allocator holds on top: heap fragments, rounded blocks. A CPU's gives large
tensors back at once under gradient checkpointing, and then holds no more than a GPU's."""
RETAINED_RELEASED = 0.15
"""The CPU's share where memory is given back after each step: what a single step makes of the heap stays."""
COPIES = 2
"""Times that a checkpoint is in memory while it is written: each tensor as bytes, and the file that they make."""
BITS = {"nf4": 4 + 32 / 64, "fp4": 4 + 32 / 64, "int8": 8.0}
"""Of a quantized weight: four bits, and a float32 scale for each block of 64."""
BITS_OF_SCALES = 0.127
"""Where they are packed too: 8/64 + 32/(64·256) bits a weight (QLoRA, sec. 3)."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes by part."""

    parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Their sum."""
        return round(sum(self.parts.values()))

    @property
    def largest(self) -> str:
        """The part that takes most."""
        return max(self.parts, key=lambda name: self.parts[name])

    def to_dict(self) -> dict[str, int]:
        """Whole bytes by part, and their total."""
        return {name: round(size) for name, size in self.parts.items()} | {"total": self.total}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What a base and a way of tuning weigh, whatever the batch."""

    weights: int
    """Bytes of the base in the format that it is computed in."""
    matrices: int
    """Values of its linear layers, which a quantizer takes."""
    largest: int
    """Values of the largest of them."""
    largest_tensor: int
    """Values of its largest tensor."""
    vocabulary: int
    width: int
    trained: int
    """Trained values."""
    trained_width: int
    """Bytes of each: four, but in full fine-tuning and BitFit those of the base's format."""
    inside: bool
    """Whether what is trained are the base's own tensors."""
    drawn: int = 0
    """Values that are held and stored beside the trained ones, and stay as they were drawn: the A of LoRA-FA."""
    trained_head: int = 0
    """Values of the output layer where it is trained too."""
    stored: int = 0
    """Bytes of the base on disk."""
    recast: bool = False
    """Whether its weights on disk have another format than the one it is computed in."""
    packed: float | None = None
    """Bytes of its linear layers where its files hold them quantized."""
    tables: int = 0
    """Values of the vocabulary's tables where they are packed into 8 bits too."""
    table_rows: int = 0
    """Rows of those, each with a float32 scale."""


def base_weights(sizes: Sizes, config: PlanConfig, method: Method, item: int, *, gpu: bool) -> tuple[float, float]:
    """Bytes of the frozen base as this method holds it, and of the buffer that one layer is unpacked into.

    A CPU unpacks strips of a layer, a GPU whole layers (`deltaw.core.packed`).
    """
    packed = packed_bytes(sizes, config, method)
    if packed is None:
        return sizes.weights, 0.0
    buffer = sizes.largest if gpu else min(sizes.largest, STRIP)
    tables = sizes.tables * (1 - item) + 4 * sizes.table_rows
    buffer += min(sizes.tables, GPU_STRIP if gpu else STRIP)
    return sizes.weights - sizes.matrices * item + packed + tables, buffer * item


def packed_bytes(sizes: Sizes, config: PlanConfig, method: Method) -> float | None:
    """Bytes of the linear layers as the files have them, or as qlora packs them; None where they are plain numbers."""
    if sizes.packed is not None:
        return sizes.packed
    if method != "qlora" or config.quantize == "none":
        return None
    scales_too = config.double_quant and config.quantize != "int8"
    return sizes.matrices * (4 + BITS_OF_SCALES if scales_too else BITS[config.quantize]) / 8


def logits(sizes: Sizes, config: PlanConfig, batch: int, length: int, item: int, *, learns: bool,
           gpu: bool = False) -> float:
    """Bytes of a stretch's logits and of what is computed from them."""
    if config.task != "causal-lm":
        return 0.0
    rows, vocabulary = stretch(sizes, config, batch, length, gpu=gpu)
    values = rows * vocabulary
    # log p takes the place of the logits, or is computed beside them: of a few rows, on a GPU of all.
    buffers = values * (item if item >= 4 or not gpu else item + 4)
    if not learns:
        return buffers
    hidden = batch * length * config.supervised * sizes.width * item
    trained = 2 * sizes.trained_head * item
    strips = rows * sizes.width * (4 + item + 4) if sizes.tables else 0  # a sum in float32, a strip's part, W_t
    return buffers + hidden + trained + strips


def stretch(sizes: Sizes, config: PlanConfig, batch: int, length: int, *, gpu: bool = False) -> tuple[int, int]:
    """Tokens whose logits exist at once, and for how much of the vocabulary: of packed tables for a strip."""
    words = sizes.vocabulary
    if sizes.tables:
        words = rows_of_a_strip(words, sizes.width, on_gpu=gpu)
    return stretch_of(config.supervised_tokens(batch, length), words), words


def state_bytes(sizes: Sizes, config: PlanConfig) -> float:
    """AdamW's two moments."""
    each = 1.0 + 8 / 256 if config.optimizer == "adamw8bit" else sizes.trained_width
    return 2 * each * sizes.trained


def held(sizes: Sizes, config: PlanConfig, method: Method, item: int, framework: float, *,
         gpu: bool) -> dict[str, float]:
    """What is there from the first step to the last."""
    base, buffer = base_weights(sizes, config, method, item, gpu=gpu)
    own = 0 if sizes.inside else adapter_bytes(sizes)
    best = sizes.trained * sizes.trained_width
    return {"framework": framework, "weights": base + buffer, "adapters": config.adapters * own + best,
            "optimizer": config.adapters * state_bytes(sizes, config)}


def training(sizes: Sizes, config: PlanConfig, method: Method, item: int, framework: float, *, kept: float,
             over: float, batch: int, length: int, gpu: bool) -> Memory:
    """The most that a step holds: at the loss, at the start of the backward pass, or at its end."""
    parts = held(sizes, config, method, item, framework, gpu=gpu)
    gradients = config.adapters * sizes.trained * sizes.trained_width
    z = logits(sizes, config, batch, length, item, learns=True, gpu=gpu)
    # Where gradients of the base's size grow while activations shrink, one of the two ends is the peak. Memory of
    # activations stays with a CPU's allocator for the next step, so that logits come on top of all of it; but under
    # gradient checkpointing every large tensor is given back at once (`deltaw.train.memory.release_at_once`).
    gives_back = gpu or config.gradient_checkpointing != "off"
    moments = [(kept, 0.0, z), (kept + over, 0.0, 0.0), (over, gradients, 0.0)] if gives_back else [
        (kept + over, 0.0, z), (over, gradients, z)]
    activations, grown, z = max(moments, key=sum)
    parts |= {"gradients": max(grown, gradients if not sizes.inside else 0.0), "activations": activations, "logits": z}
    share = RETAINED_GPU if gives_back else RETAINED_RELEASED if config.release_memory else RETAINED_CPU
    retained = share * (activations + grown)
    return Memory(parts | {"allocator": retained if gives_back else HOLES_CPU + retained})


def evaluation(sizes: Sizes, config: PlanConfig, method: Method, item: int, framework: float, *, forward: float,
               cache: float, batch: int, length: int, gpu: bool) -> Memory:
    """The most that an evaluation between two steps holds: a forward pass, or the answers' keys and values."""
    parts = held(sizes, config, method, item, framework, gpu=gpu)
    z = logits(sizes, config, batch, length, item, learns=False, gpu=gpu)
    return Memory(parts | {"gradients": 0.0, "activations": max(forward, cache), "logits": z, "allocator": 0.0})


def saving(sizes: Sizes, config: PlanConfig, method: Method, item: int, framework: float, *, gpu: bool) -> Memory:
    """Writing a checkpoint: tensors, moments and best tensors as the bytes of a file."""
    parts = held(sizes, config, method, item, framework, gpu=gpu)
    file = float((1 if gpu else COPIES) * checkpoint_bytes(sizes, config))
    return Memory(parts | {"gradients": 0.0, "activations": 0.0, "logits": 0.0, "file": file})


def merging(sizes: Sizes, item: int) -> Memory:
    """`deltaw merge`: tensor by tensor; one that is copied, or a layer as stored, in float32 and its change."""
    one = max(sizes.largest_tensor * item, sizes.largest * (item + 4 + 4))
    change = 4.0 * (sizes.trained + sizes.drawn)
    return Memory({"framework": float(FRAMEWORK_MERGE), "weights": float(one), "adapters": change})


def loading(sizes: Sizes, config: PlanConfig, method: Method, item: int, framework: float, *, gpu: bool) -> Memory:
    """Bringing the base in: mapped where its format is right, else tensor by tensor beside its mapped file."""
    base, _ = base_weights(sizes, config, method, item, gpu=gpu)
    packs = sizes.packed is None and packed_bytes(sizes, config, method) is not None
    mapped = 3 * sizes.largest * 4 if packs else sizes.stored if sizes.recast else 0
    return Memory({"framework": framework, "weights": base, "file": float(mapped)})


def adapter_bytes(sizes: Sizes) -> int:
    """The file of what was trained, and of what it rests on."""
    return (sizes.trained + sizes.drawn) * sizes.trained_width


def checkpoint_bytes(sizes: Sizes, config: PlanConfig) -> int:
    """What a checkpoint to resume from takes on disk: tensors, two moments and the best tensors."""
    return round(2 * sizes.trained * sizes.trained_width + state_bytes(sizes, config))


def item_size(dtype: str) -> int:
    """Bytes of a value of this number format."""
    return {"float32": 4, "bfloat16": 2, "float16": 2}[dtype]
