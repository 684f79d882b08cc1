"""Kernels in a step that is followed on tensors without values: they compute nothing, and tell what they would.

A plan runs the real step on torch's meta device and listens. torch's operations are heard there, a call of a kernel in
C is not, and where the step is planned for a machine with the kernels it is theirs that counts. So within `followed`
the kernels take tensors without values too, and each such call goes to the listener. Whether this machine has them is
no matter; what has values is computed as ever.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

Shape = tuple[int, int, int]
"""(M, N, K) of a product."""


class Listener(Protocol):
    """Who hears what kernels would do."""

    def hear_products(self, frozen: Sequence[Shape], narrow: Sequence[Shape]) -> None:
        """One call: products with frozen weights, and those of low-rank changes among them."""

    def hear_pass(self, moved: int) -> None:
        """One call that reads and writes so many bytes."""


_listener: Listener | None = None


@contextmanager
def followed(listener: Listener) -> Iterator[None]:
    """Kernels of bfloat16 take tensors without values too, for the length of the block."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before


def listener_of(tensor: Tensor) -> Listener | None:
    """Who is told of a call with this tensor; None where it has values, and the call is to be made."""
    return _listener if tensor.is_meta else None


def are_served(*tensors: Tensor) -> bool:
    """Whether tensors are of the kind that kernels take: bfloat16, in a processor's memory or followed."""
    return all(t.dtype == torch.bfloat16 and (t.device.type == "cpu" or listener_of(t) is not None) for t in tensors)
