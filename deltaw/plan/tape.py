"""What a step keeps and computes, found by running it on tensors that have shapes and no values.

The step is the real one: the network's own forward, the fused low-rank nodes, gradient checkpointing, autograd's
backward. On torch's meta device none of it costs memory or arithmetic. A `Tape` listens to every operation: it adds up
the tensors that are alive, as an allocator would see them, and counts multiplications and bytes. No formula for any
architecture is written anywhere.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deltaw.core.followed import Shape
from deltaw.plan.found import Products, Work

_aten = torch.ops.aten
_CREATING = {"empty", "zeros", "ones", "full", "new_empty", "new_zeros", "empty_like", "zeros_like", "arange"}
_DRAWING = {"bernoulli", "bernoulli_", "native_dropout", "rand_like", "randn_like", "uniform_", "normal_"}
_STARTS_OF_A_KERNEL = 8
"""A call of a kernel in C takes as long, with the Python around it, as so many of torch's small operations."""
_BACKWARD_OF_ATTENTION = 2.5
"""Products in the backward pass of attention for each product of its forward: five for two."""


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Listens to the operations in its block. `known` tensors, such as weights, were there before and are not counted.

    `answer` is given to the few questions about values that a forward asks: is nothing padded, is this one example,
    are these two equal?
    """

    def __init__(self, known: Iterable[Tensor] = (), *, answer: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.answer = answer
        self.now = 0
        self.heights = [0]
        """Bytes alive after each tensor that came, since the last `restart`."""
        self._products: Products = Counter()
        self._frozen: Products = Counter()
        self._narrow: Products = Counter()
        self._attention = self._moved = self._calls = self._passes = self._drawn = 0.0
        self._sizes: dict[int, int] = {}
        for tensor in known:
            self._meet(tensor.untyped_storage(), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        if func in (_aten._local_scalar_dense.default, _aten.equal.default) and args[0].is_meta:
            return self.answer
        out = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        new = False
        for tensor in made:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._sizes:
                new = True
                self._meet(storage, storage.nbytes())
        self._count(func, args, kwargs or {}, made, new)
        return out

    @property
    def peak(self) -> int:
        """The most bytes that were alive since the last `restart`."""
        return max(self.heights)

    def restart(self) -> None:
        """Take the present as the new peak."""
        self.heights = [self.now]

    def total(self) -> Work:
        """The work heard so far."""
        return Work(Counter(self._products), self._attention, self._moved, self._calls, Counter(self._frozen),
                    Counter(self._narrow), self._passes, self._drawn)

    def hear_products(self, frozen: Sequence[Shape], narrow: Sequence[Shape]) -> None:
        """A call of a kernel that multiplies matrices (`deltaw.core.followed`)."""
        self._calls += _STARTS_OF_A_KERNEL
        self._frozen.update((1, *shape) for shape in frozen)
        self._narrow.update((1, *shape) for shape in narrow)

    def hear_pass(self, moved: int) -> None:
        """A call of a kernel that multiplies none."""
        self._calls += _STARTS_OF_A_KERNEL
        self._passes += moved

    def _meet(self, storage: torch.UntypedStorage, size: int) -> None:
        self._sizes[storage._cdata] = size
        self.now += size
        self.heights.append(self.now)
        weakref.finalize(storage, self._forget, storage._cdata).atexit = False

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)

    def _count(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], made: list[Tensor],
               new: bool) -> None:
        name = func._schema.name.partition("::")[2]
        in_place = name.endswith("_") or "out" in kwargs
        if not (new or in_place) or name in _CREATING:
            return  # a view, or memory that nobody has written yet
        self._calls += 1
        self._drawn += sum(t.numel() for t in made[:1]) if name in _DRAWING else 0
        shape = _product(name, args)
        if shape is not None:
            self._products[shape] += 1
        elif "attention" in name:
            self._attention += _attention(name, args)
        else:
            inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            self._moved += sum(t.numel() * t.element_size() for t in [*inputs, *made])


def _product(name: str, args: tuple[Any, ...]) -> tuple[int, int, int, int] | None:
    """(batch, M, N, K) of a matrix product."""
    if name in ("addmm", "addmm_", "baddbmm", "baddbmm_"):
        args, name = args[1:], "bmm" if name.startswith("b") else "mm"
    if name == "mm":
        return 1, args[0].shape[0], args[1].shape[1], args[0].shape[1]
    if name == "bmm":
        return args[0].shape[0], args[0].shape[1], args[1].shape[2], args[0].shape[2]
    return None


def _attention(name: str, args: tuple[Any, ...]) -> float:
    """Multiplications and additions of fused attention; half of the square where it looks back only."""
    backward = name.endswith("backward")
    query, key = args[1:3] if backward else args[:2]
    heads, width = query.shape[1], query.shape[-1]
    places = next((a for a in args if isinstance(a, Tensor) and a.dtype == torch.int32), None)
    if places is not None:
        pairs = sum((b - a) ** 2 for a, b in pairwise(places.tolist())) / 2
    else:
        causal = any(a is True for a in args)
        pairs = query.shape[0] * query.shape[2] * key.shape[2] / (2 if causal else 1)
    return float(4.0 * heads * width * pairs * (_BACKWARD_OF_ATTENTION if backward else 1.0))


@contextmanager
def as_on_cpu() -> Iterator[None]:
    """Attention as torch computes it on a CPU, where meta tensors would take the way that keeps all scores.

    The function is exchanged in its module, since a mode of torch is left while autograd runs a recomputed layer.
    """
    own = F.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
               is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Tensor:
        if dropout_p or not query.is_meta:
            return own(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if attn_mask is not None and attn_mask.dtype == torch.bool:  # torch makes numbers of it first
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
        out: Tensor = _aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
        return out

    F.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = own


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Every parameter and buffer."""
    return [*module.parameters(), *module.buffers()]
