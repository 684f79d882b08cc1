"""A random projection P from d values to D without its matrix: Fastfood (Le, Sarlós & Smola 2013; Li et al. 2018).

    P = [V_1; V_2; ...] cut to D rows,   V_k = H G_k Π_k H B_k / (√(n·ΣG_k²)·√(D/n)),   n = 2^⌈log2 d⌉

H is the Walsh-Hadamard matrix of ±1, B_k random signs, Π_k a random permutation, G_k Gaussian; the d values are filled
up with zeros to n. A column of P has length 1 on average. It takes O(D log d) time, and O(D) memory for B, Π and G.

Blocks go through all operations a few at a time, so that what is between them stays in the processor's cache, and the
gradient Pᵀg runs the same operations backwards instead of letting autograd keep what was between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_RADIX = 32
_AT_ONCE = {"cpu": 1 << 20}  # values: four megabytes, few enough for the cache and enough for two threads
_AT_ONCE_ELSEWHERE = 1 << 24  # where what an operation costs is its launch


class Fastfood:
    """The rows of P for one tensor of `rows` values out of `total`, in whole blocks of n."""

    def __init__(self, dimension: int, rows: int, *, total: int, generator: torch.Generator,
                 device: torch.device) -> None:
        self.dimension, self.rows = dimension, rows
        self.n = 1 << (dimension - 1).bit_length()
        blocks = -(-rows // self.n)
        if device.type == "meta":
            self.signs_KN = torch.empty(blocks, self.n, dtype=torch.int8, device=device)
            self.order_KN = torch.empty(blocks, self.n, dtype=torch.int32, device=device)
            self.gauss_KN = torch.empty(blocks, self.n, device=device)
            return
        self.signs_KN = (torch.randint(2, (blocks, self.n), generator=generator, dtype=torch.int8) * 2 - 1).to(device)
        order = torch.stack([torch.randperm(self.n, generator=generator) for _ in range(blocks)])
        self.order_KN = order.to(torch.int32).to(device)
        gauss = torch.randn(blocks, self.n, generator=generator)
        lengths_K1 = (self.n * gauss.square().sum(1, keepdim=True)).sqrt() * (total / self.n) ** 0.5
        self.gauss_KN = (gauss / lengths_K1).to(device)

    def __call__(self, theta: Tensor) -> Tensor:
        """P θ at these rows, (rows,); linear in θ (d,), and differentiable."""
        return _Project.apply(theta, self)  # type: ignore[no-any-return, no-untyped-call]

    def project(self, theta: Tensor) -> Tensor:
        """P θ."""
        filled_N = F.pad(theta, (0, self.n - self.dimension))
        out_KN = theta.new_empty(len(self.signs_KN), self.n)
        for some in self._stretches():
            x_KN = walsh_hadamard(filled_N * self.signs_KN[some])
            x_KN = x_KN.gather(1, self.order_KN[some].long()) * self.gauss_KN[some]
            out_KN[some] = walsh_hadamard(x_KN)
        return out_KN.flatten()[:self.rows]

    def project_back(self, y: Tensor) -> Tensor:
        """Pᵀ y, (d,), of y (rows,)."""
        y_KN = F.pad(y, (0, self.signs_KN.numel() - self.rows)).view_as(self.signs_KN)  # the last block may be cut
        total_N = y.new_zeros(self.n)
        for some in self._stretches():
            x_KN = walsh_hadamard(y_KN[some]) * self.gauss_KN[some]
            x_KN = torch.empty_like(x_KN).scatter_(1, self.order_KN[some].long(), x_KN)
            total_N += (walsh_hadamard(x_KN) * self.signs_KN[some]).sum(0)
        return total_N[:self.dimension]

    def _stretches(self) -> Iterator[slice]:
        blocks = len(self.signs_KN)
        step = max(_AT_ONCE.get(self.signs_KN.device.type, _AT_ONCE_ELSEWHERE) // self.n, 1)
        return (slice(start, min(start + step, blocks)) for start in range(0, blocks, step))


class _Project(torch.autograd.Function):
    """P θ and its gradient Pᵀ g."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, p: Fastfood) -> Tensor:
        ctx.p = p
        return p.project(theta)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.p.project_back(grad), None


def walsh_hadamard(x_KN: Tensor) -> Tensor:
    """H x for each row, n a power of two: H_n = H_32 ⊗ ... ⊗ H_32 ⊗ H_rest, one small product for each factor.

    >>> walsh_hadamard(torch.tensor([[1.0, 2.0]]))
    tensor([[ 3., -1.]])
    """
    K, n = x_KN.shape
    done = 1
    while done < n:
        radix = min(_RADIX, n // done)
        H = _hadamard(radix, x_KN.dtype, x_KN.device)
        if done == 1:
            x_KN = x_KN.reshape(-1, radix) @ H
        else:
            parts = x_KN.reshape(-1, radix, done)
            x_KN = torch.bmm(H.expand(len(parts), radix, radix), parts)
        done *= radix
    return x_KN.reshape(K, n)


@cache
def _hadamard(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrix of ±1 with H_2n = [[H, H], [H, -H]]."""
    with torch.inference_mode(False):  # it is kept, and may be used for training next
        H = torch.ones(1, 1, dtype=dtype, device=device)
        while len(H) < n:
            H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H
