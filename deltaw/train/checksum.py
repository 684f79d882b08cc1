"""A checksum over every bit of a set of tensors, on whatever device they are.

    Σ_i word_i · w_i  mod 2^64        words of 8 bytes; w_i odd, fixed, random

An odd factor is invertible modulo 2^64, so a change of any single word changes the sum; any other change goes unseen
with a chance of about 2^-63. It reads memory once: a quarter of a second for 135 million float32 weights on one CPU
thread.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor

_CHUNK = 1 << 16  # words at a time: the products stay in the processor's cache
_WORD = 8
_MODULUS = 1 << 64


def checksum(tensor: Tensor) -> int:
    """64 bits over the bits of one tensor in row-major order; 0 for one on the meta device."""
    if tensor.is_meta:
        return 0
    stored = tensor.detach().contiguous().view(-1).view(torch.uint8)
    whole = stored.numel() // _WORD * _WORD
    if stored.storage_offset() % _WORD:
        stored = stored.clone()
    words, rest = stored[:whole].view(torch.int64), stored[whole:].to(torch.int64)
    weights = _weights(tensor.device)
    total = int((rest * weights[:rest.numel()]).sum())
    parts = [(chunk * weights[:chunk.numel()]).sum() for chunk in torch.split(words, _CHUNK)]
    for number, part in enumerate(torch.stack(parts).tolist() if whole else ()):  # a GPU is waited for once
        # Chunks differ by an odd factor, so that two of them cannot be exchanged unseen.
        total = (total + part * (2 * number * number + 2 * number + 3)) % _MODULUS
    return total % _MODULUS


def checksums(named_tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """The checksum of each tensor, by name."""
    return {name: checksum(tensor) for name, tensor in named_tensors}


@lru_cache(maxsize=4)
def _weights(device: torch.device) -> Tensor:
    """The same random odd integers every time, made on the CPU so that they do not depend on the device."""
    generator = torch.Generator().manual_seed(0x5DEECE66D)
    low, high = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    return (torch.randint(low, high, (_CHUNK,), generator=generator) | 1).to(device)
