"""The kernel of `core/native/loss.c`: the loss of bfloat16 logits and its gradient, on a processor.

    ℓ = (1-ε)·(lse(z) - z_t) + ε·(lse(z) - mean z) + ζ·lse(z)²,  dz = p - (1-ε)·1_t - ε/V + 2ζ·lse·p

A row is read where it lies, in three passes that leave it in its thread's cache; torch takes eight operations, most of
them over a copy in float32. It is for the processors of `native_low_rank`, and needs a C compiler on the machine.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from deltaw.core.compiled import NATIVE, are_made, passes
from deltaw.train.terms import Terms


class _Job(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int64) for name in ("rows", "V", "stride", "threads")),
                *((name, ctypes.c_double) for name in ("smoothing", "z_loss")),
                *((name, ctypes.c_void_p) for name in ("z", "target", "loss"))]


def fits(z_NV: Tensor, targets_N: Tensor) -> bool:
    """Whether the kernel can be asked for the loss of these logits."""
    return (z_NV.dtype == torch.bfloat16 and z_NV.device.type == targets_N.device.type == "cpu"
            and targets_N.dtype == torch.int64 and z_NV.stride(1) == 1 and not torch.compiler.is_compiling()
            and is_there())


@cache
def is_there() -> bool:
    """Whether this machine has the kernel."""
    return are_made(_library)


@cache
def _library() -> ctypes.CDLL:
    return passes(NATIVE / "loss.c", _Job)


def losses(z_NV: Tensor, targets_N: Tensor, terms: Terms, *, gradients: bool) -> Tensor:
    """The loss (N,) of each row in float32; where gradients are wanted, they take the place of z."""
    loss_N, targets_N = z_NV.new_empty(len(z_NV), dtype=torch.float32), targets_N.contiguous()
    run = _library().backward if gradients else _library().forward
    if not run(ctypes.byref(_Job(*z_NV.shape, z_NV.stride(0), torch.get_num_threads(), terms.smoothing, terms.z_loss,
                                 z_NV.data_ptr(), targets_N.data_ptr(), loss_N.data_ptr()))):
        raise IndexError(f"a target is none of the {z_NV.shape[1]} words")
    return loss_N
