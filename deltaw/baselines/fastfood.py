"""A random projection P from d values to D without its matrix: Fastfood (Le, Sarlós & Smola 2013; Li et al. 2018).

    P = [V_1; V_2; ...] cut to D rows,   V_k = H G_k Π_k H B_k / (√(n·ΣG_k²)·√(D/n)),   n = 2^⌈log2 d⌉

H is the Walsh-Hadamard matrix of ±1, B_k random signs, Π_k a random permutation, G_k Gaussian; the d values are filled
up with zeros to n. A column of P has length 1 on average. It takes O(D log d) time, and O(D) memory for B, Π and G.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_RADIX = 64


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
        order += torch.arange(blocks)[:, None] * self.n  # into all blocks, laid end to end
        self.order_KN = order.to(torch.int32 if blocks * self.n < 1 << 31 else torch.int64).to(device)
        gauss = torch.randn(blocks, self.n, generator=generator)
        lengths_K1 = (self.n * gauss.square().sum(1, keepdim=True)).sqrt() * (total / self.n) ** 0.5
        self.gauss_KN = (gauss / lengths_K1).to(device)

    def __call__(self, theta: Tensor) -> Tensor:
        """P θ at these rows, (rows,); linear in θ (d,), and differentiable."""
        filled_N = F.pad(theta, (0, self.n - self.dimension))
        x_KN = walsh_hadamard(filled_N * self.signs_KN)
        x_KN = x_KN.flatten().index_select(0, self.order_KN.flatten()).view_as(x_KN)
        return walsh_hadamard(x_KN * self.gauss_KN).flatten()[:self.rows]


def walsh_hadamard(x_KN: Tensor) -> Tensor:
    """H x for each row, n a power of two: H_n = H_64 ⊗ ... ⊗ H_64 ⊗ H_rest, one small product for each factor.

    >>> walsh_hadamard(torch.tensor([[1.0, 2.0]]))
    tensor([[ 3., -1.]])
    """
    K, n = x_KN.shape
    done = 1
    while done < n:
        radix = min(_RADIX, n // done)
        x_KN = (x_KN.reshape(-1, radix, done).transpose(1, 2) @ _hadamard(radix, x_KN)).transpose(1, 2)
        done *= radix
    return x_KN.reshape(K, n)


def _hadamard(n: int, like: Tensor) -> Tensor:
    """The matrix of ±1 with H_2n = [[H, H], [H, -H]]."""
    H = like.new_ones(1, 1)
    while len(H) < n:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H
