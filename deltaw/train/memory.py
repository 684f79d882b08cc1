"""Memory: giving some up for time in transformers' models, and measuring what a process holds."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from deltaw.bases.exchanged import exchanged
from deltaw.errors import BaseModelError, Fault

_M_MMAP_THRESHOLD, _LARGE = -3, 1 << 18
_CPU = torch.device("cpu")


def recompute_activations(model: Any) -> None:
    """Let a transformers model compute each layer's activations again in the backward pass (gradient checkpointing).

    Not the reentrant kind, which drops the gradients of everything inside a layer whose inputs need none: the inputs of
    a frozen network's first layer. The doctor would find that; here it cannot happen.
    """
    if not model.supports_gradient_checkpointing:
        raise BaseModelError(Fault("gradient_checkpointing", f"{type(model).__name__} does not support it",
                                   "a model that does", "Turn it off, and lower batch_size if memory is short"))
    arguments = {"use_reentrant": False}
    # transformers renamed the method in 5.22; before that only the older name is there.
    renamed = getattr(model, "activation_checkpointing_enable", None)
    if renamed is not None:
        renamed(arguments)
    else:
        model.gradient_checkpointing_enable(arguments)


@contextmanager
def recomputed(modules: Sequence[nn.Module]) -> Iterator[None]:
    """These modules with their insides computed again in the backward pass, for the length of the block."""
    with exchanged({module: partial(_again, module.forward) for module in modules}):
        yield


def _again(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def saved_bytes(forward: Callable[[], torch.Tensor]) -> int:
    """Bytes that a forward keeps for its backward pass: each storage once, the model's own parameters apart.

    The result of `forward` is thrown away. Storages are told apart by address, so it has to be alive until the end.
    """
    kept: dict[int, int] = {}
    alive: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter) and not (tensor._is_view() and isinstance(tensor._base, nn.Parameter)):
            alive.append(tensor)
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = forward()
    del loss
    return sum(kept.values())


def release_at_once() -> bool:
    """Let the process give back the memory of each large tensor when it is freed; whether that could be arranged.

    glibc keeps freed memory in a heap that is full of holes after some layers: 0.8 GB of growth from 512 to 2,048
    tokens where 0.13 are needed. Mapping each tensor of 256 kB or more by itself costs page faults, a tenth to a fifth
    of a step's time (nearly half of GPT-2's with dropout), so that it is for those who ask for memory. It stays so
    for the process.
    """
    libc = _glibc()
    return libc is not None and bool(libc.mallopt(_M_MMAP_THRESHOLD, _LARGE))


def give_back() -> None:
    """Give the system all memory that the process has freed, holes included; nothing where the C library is not glibc.

    Between two steps nearly all of a heap is free, but in pieces: the next step finds no piece that fits and takes
    more, a quarter beyond what it needs. Given back, the pieces are one again.
    """
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


@contextmanager
def settled() -> Iterator[None]:
    """Let Python's collector pass over all objects that there are now, for the length of the block.

    A model and the libraries around it are most of a million objects, and each full collection looks at every one: a
    third of a second, which a step of many adapters pays each time by the small objects that it makes.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _glibc() -> Any:
    """The C library where it is glibc; others give mallopt's numbers another meaning, and have no malloc_trim."""
    try:
        import ctypes

        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018
    except (AttributeError, OSError, TypeError):
        return None
    return libc


def memory_in_use(device: torch.device = _CPU) -> int:
    """Bytes that the process holds now: of tensors on a GPU, else resident; 0 where that is not known."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return peak_memory()
    return pages * os.sysconf("SC_PAGE_SIZE")


def count_peak_anew(device: torch.device) -> None:
    """Let `peak_memory` of a GPU count from here; that of the process cannot be set back."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device = _CPU) -> int:
    """The most bytes that the process has held: of tensors on a GPU, else resident; 0 where not known."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
