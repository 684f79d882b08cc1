"""The kernels of `norm.c`, `gate.c` and `rotary.c` in `core/native`: rows of bfloat16 on a processor, one pass each.

What a frozen network does beside its products is small work that torch does in many passes, each through memory and
with its own conversion to float32. They are for the processors of `native_attention`, and need a C compiler.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from deltaw.core import followed
from deltaw.core.compiled import NATIVE, are_made, passes


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class _Norm(ctypes.Structure):
    _fields_ = [*_fields(ctypes.c_int64, "rows D x_stride g_stride"), *_fields(ctypes.c_int32, "threads form"),
                ("eps", ctypes.c_float), *_fields(ctypes.c_void_p, "x g w out r")]


class _Gate(ctypes.Structure):
    _fields_ = [*_fields(ctypes.c_int64, "rows O g_stride u_stride dp_stride threads"),
                *_fields(ctypes.c_void_p, "g u dp p dg du")]


class _View(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *_fields(ctypes.c_int64, "row head token")]


class _Angles(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *_fields(ctypes.c_int64, "row token")]


class _Rotary(ctypes.Structure):
    _fields_ = [*_fields(ctypes.c_int64, "rows heads T D threads"), *_fields(_View, "x y"),
                *_fields(_Angles, "cosine sine")]


def fit(*tensors: Tensor) -> bool:
    """Whether the kernels can be asked for these: in bfloat16 on a processor that they are for."""
    return followed.are_served(*tensors) and (all(t.is_meta for t in tensors) or is_there())


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_there() -> bool:
    """Whether this machine has the kernels."""
    return _were_made()


@cache
def _were_made() -> bool:
    return are_made(*(partial(_library, name) for name in _JOBS))


_JOBS = {"norm": _Norm, "gate": _Gate, "rotary": _Rotary}


@cache
def _library(name: str) -> ctypes.CDLL:
    return passes(NATIVE / f"{name}.c", _JOBS[name])


def norm(x: Tensor, w: Tensor, eps: float, form: int) -> tuple[Tensor, Tensor]:
    """RMSNorm y of x (..., D), and 1 / rms (..., 1) in float32; `form` is one of `norms.Form`."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    r, x_TD, w = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32), _rows(x), w.contiguous()
    _run("norm", "forward", (x, y), _Norm(
        len(x_TD), x.shape[-1], x_TD.stride(0), 0, torch.get_num_threads(), form, eps,
        x_TD.data_ptr(), None, w.data_ptr(), y.data_ptr(), r.data_ptr()))
    return y, r


def norm_backward(g: Tensor, x: Tensor, w: Tensor, r: Tensor, form: int) -> Tensor:
    """The gradient of `norm`'s x, from g of y."""
    dx, x_TD, g_TD = torch.empty_like(x, memory_format=torch.contiguous_format), _rows(x), _rows(g)
    w, r = w.contiguous(), r.contiguous()
    _run("norm", "backward", (x, g, dx), _Norm(
        len(x_TD), x.shape[-1], x_TD.stride(0), g_TD.stride(0), torch.get_num_threads(), form, 0.0,
        x_TD.data_ptr(), g_TD.data_ptr(), w.data_ptr(), dx.data_ptr(), r.data_ptr()))
    return dx


def gate(g: Tensor, u: Tensor) -> Tensor:
    """silu(g)·u of g and u (..., O), silu(g) rounded first as where it is a tensor of its own."""
    p, g_TO, u_TO = torch.empty_like(g, memory_format=torch.contiguous_format), _rows(g), _rows(u)
    _run("gate", "forward", (g, u, p), _Gate(
        *g_TO.shape, g_TO.stride(0), u_TO.stride(0), 0, torch.get_num_threads(),
        g_TO.data_ptr(), u_TO.data_ptr(), None, p.data_ptr(), None, None))
    return p


def gate_backward(dp: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `gate`'s g and u, from dp of its product."""
    dg, du = (torch.empty_like(g, memory_format=torch.contiguous_format) for _ in range(2))
    g_TO, u_TO, dp_TO = _rows(g), _rows(u), _rows(dp)
    _run("gate", "backward", (dp, g, u, dg, du), _Gate(
        *g_TO.shape, g_TO.stride(0), u_TO.stride(0), dp_TO.stride(0), torch.get_num_threads(),
        g_TO.data_ptr(), u_TO.data_ptr(), dp_TO.data_ptr(), None, dg.data_ptr(), du.data_ptr()))
    return dg, du


def rotated(x: Tensor, cosine: Tensor, sine: Tensor, *, back: bool = False) -> Tensor:
    """x (B, heads, T, D) at its positions, tokens before heads in memory; `back`: the gradient of x from that of y.

    cosine and sine are (B or 1, T, D); D is even.
    """
    B, heads, T, D = x.shape
    y = x.new_empty_strided((B, heads, T, D), (T * heads * D, D, heads * D, 1))
    x, angles = _side_by_side(x), [_side_by_side(t.expand(B, T, D)) for t in (cosine, sine)]
    views = [_View(t.data_ptr(), *t.stride()[:3]) for t in (x, y)]
    _run("rotary", "backward" if back else "forward", (x, y), _Rotary(
        B, heads, T, D, torch.get_num_threads(), *views, *(_Angles(t.data_ptr(), *t.stride()[:2]) for t in angles)))
    return y


def _rows(t: Tensor) -> Tensor:
    """(T, N) of (..., N), where it lies if its tokens are evenly apart."""
    return _side_by_side(t.reshape(-1, t.shape[-1]))


def _side_by_side(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _run(name: str, direction: str, moved: Sequence[Tensor], job: ctypes.Structure) -> None:
    """Ask a kernel, which reads and writes the tensors of `moved` once."""
    listener = followed.listener_of(moved[0])
    if listener is not None:
        listener.hear_pass(sum(t.numel() * t.element_size() for t in moved))
        return
    getattr(_library(name), direction)(ctypes.byref(job))
