"""Attention kernels of torch that take every new length as it comes.

On Hopper and Blackwell torch prefers cuDNN's attention, which plans anew for each shape that it has not seen: 20 to 40
ms for a length, forward and backward each. Where every call brings another length, that is most of the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def attention_of_any_length(device: torch.device) -> Iterator[None]:
    """`scaled_dot_product_attention` without cuDNN for the length of the block; off a GPU nothing changes.

    The choice is the process's, as torch has it.
    """
    if device.type != "cuda":
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        yield
