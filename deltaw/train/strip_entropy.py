"""Cross entropy over an output layer in 8 bits: one pass over its strips, which are unpacked once for all tokens.

With the losses of `cross_entropy`, c = 1 + 2ζ·lse and the target's row W_t apart from the sum over all other rows,

    dh = c·Σ_{v≠t} p_v W_v + (c·p_t - (1-ε))·W_t - (ε/V)·Σ_v W_v        p_v = exp(z_v - lse)

lse is known only when all strips were seen. So the sum is kept for exponentials of z - m, with m the largest logit of a
token so far, and is scaled down when a strip has a larger one (the online softmax of FlashAttention, arXiv 2205.14135).
The logits of the whole vocabulary never exist. In float32 or wider are the sums over strips, the exponentials, and what
is done to the target, where rounding p - 1 would be most of what is left of a token that is known already.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltaw.core.frozen import Stripped, add_transposed, write_product
from deltaw.core.stretches import rows_of_a_strip, stretch_of
from deltaw.core.tables import PackedHead, head_strips
from deltaw.train.terms import Terms

_BLOCK = 16
"""Tokens whose exponentials are taken at once by a processor, in its cache; a GPU takes them all."""


@torch.no_grad()
def passed_over(h_NI: Tensor, targets_N: Tensor, head: PackedHead, terms: Terms, dh_NI: Tensor | None) -> Tensor:
    """The loss (N,) of each token, float32 or wider; the gradient of their sum goes to dh (N, I), where one is given.

    So many tokens at a time that the logits of a strip are as few as a stretch's; each time unpacks the whole layer.
    """
    vocabulary = head.out_features
    strip = rows_of_a_strip(vocabulary, head.in_features, on_gpu=h_NI.is_cuda)
    rows = stretch_of(len(h_NI), strip)
    losses = []
    for start in range(0, len(h_NI), rows):
        part = slice(start, start + rows)
        tokens = _Pass(h_NI[part], targets_N[part], head, terms, learns=dh_NI is not None)
        losses.append(tokens.loss_N())
        if dh_NI is not None:
            dh_NI[part] = tokens.gradient_NI()
    return torch.cat(losses) if losses else h_NI.new_zeros(0, dtype=torch.promote_types(h_NI.dtype, torch.float32))


class _Pass:
    """Some tokens, and what is known of each after the strips so far."""

    def __init__(self, h_NI: Tensor, targets_N: Tensor, head: PackedHead, terms: Terms, *, learns: bool) -> None:
        self.h_NI, self.targets_N, self.head, self.terms = h_NI, targets_N, head, terms
        self.wide = torch.promote_types(h_NI.dtype, torch.float32)
        self.lowest = torch.finfo(self.wide).min
        count = len(h_NI)
        self.most_N1 = h_NI.new_full((count, 1), self.lowest, dtype=self.wide)
        """m: the largest logit but the target's."""
        self.sum_N1, self.target_N1, self.all_N1 = (h_NI.new_zeros(count, 1, dtype=self.wide) for _ in range(3))
        """Σ exp(z - m) without the target, the target's z, and Σ z."""
        self.mixed_NI = h_NI.new_zeros(h_NI.shape, dtype=self.wide) if learns else None
        """Σ exp(z - m) W without the target."""
        self.rows_I = h_NI.new_zeros(h_NI.shape[1], dtype=self.wide) if learns and terms.smoothing else None
        """Σ W."""
        self.memory: dict[str, Tensor] = {}
        for place, W_RI in head_strips(head, h_NI):
            self.add(place, W_RI)
        self.lse_N1 = torch.logaddexp(self.most_N1 + self.sum_N1.log(), self.target_N1)

    def add(self, place: slice, W_RI: Tensor | Stripped) -> None:
        """Take one strip of the vocabulary in."""
        z_NR = self.buffer("logits", len(self.h_NI), W_RI.shape[0], self.h_NI.dtype)
        bias = self.head.bias
        write_product(self.h_NI, W_RI, None if bias is None else bias[place].to(z_NR.dtype), z_NR)
        before_N1 = self.most_N1.clone()
        block = _BLOCK if z_NR.is_cpu else max(1, len(z_NR))
        for start in range(0, len(z_NR), block):
            self.exponentials(z_NR[start:start + block], slice(start, start + block), place)
        if self.mixed_NI is not None:
            self.mixed_NI.mul_((before_N1 - self.most_N1).exp_()).add_(add_transposed(z_NR, W_RI, None))
        if self.rows_I is not None:
            rows_RI = W_RI.packed.dense(z_NR.dtype) if isinstance(W_RI, Stripped) else W_RI
            self.rows_I += rows_RI.sum(0, dtype=self.wide)

    def exponentials(self, z_BR: Tensor, tokens: slice, place: slice) -> None:
        """Put exp(z - m) in the place of some tokens' logits z, with m and the sums brought up to this strip."""
        wide_BR = z_BR
        if z_BR.dtype != self.wide:
            wide_BR = self.buffer("wide", len(z_BR), z_BR.shape[1], self.wide).copy_(z_BR)
        if self.terms.smoothing:
            self.all_N1[tokens] += wide_BR.sum(1, keepdim=True)
        column_B1 = self.targets_N[tokens].unsqueeze(1) - place.start
        inside_B1 = (column_B1 >= 0) & (column_B1 < z_BR.shape[1])
        column_B1 = column_B1.clamp(0, z_BR.shape[1] - 1)
        here_B1 = wide_BR.gather(1, column_B1)
        self.target_N1[tokens] = torch.where(inside_B1, here_B1, self.target_N1[tokens])
        wide_BR.scatter_(1, column_B1, here_B1.masked_fill(inside_B1, self.lowest))
        most_B1 = torch.maximum(self.most_N1[tokens], wide_BR.amax(1, keepdim=True))
        wide_BR.sub_(most_B1).exp_()
        shrink_B1 = (self.most_N1[tokens] - most_B1).exp_()
        self.sum_N1[tokens] = self.sum_N1[tokens] * shrink_B1 + wide_BR.sum(1, keepdim=True)
        self.most_N1[tokens] = most_B1
        if wide_BR is not z_BR:
            z_BR.copy_(wide_BR)

    def loss_N(self) -> Tensor:
        """The loss of each token."""
        eps, zeta, lse_N1 = self.terms.smoothing, self.terms.z_loss, self.lse_N1
        loss_N1 = (1 - eps) * (lse_N1 - self.target_N1)
        if eps:
            loss_N1 += eps * (lse_N1 - self.all_N1 / self.head.out_features)
        if zeta:
            loss_N1 += zeta * lse_N1.square()
        return loss_N1.squeeze(1)

    def gradient_NI(self) -> Tensor:
        """dh, in float32 or wider; takes the memory of the sum."""
        assert self.mixed_NI is not None
        eps, lse_N1 = self.terms.smoothing, self.lse_N1
        c_N1 = 1 + 2 * self.terms.z_loss * lse_N1
        W_t_NI = self.head.packed.rows(self.targets_N, self.h_NI.dtype).to(self.wide)
        dh_NI = self.mixed_NI.mul_(c_N1 * (self.most_N1 - lse_N1).exp())
        dh_NI += W_t_NI.mul_(c_N1 * (self.target_N1 - lse_N1).exp() - (1 - eps))
        if self.rows_I is not None:
            dh_NI -= self.rows_I * (eps / self.head.out_features)
        return dh_NI

    def buffer(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Memory that the strips share; the last strip and the last tokens may need less."""
        if name not in self.memory:
            self.memory[name] = torch.empty(rows * columns, dtype=dtype, device=self.h_NI.device)
        if self.memory[name].numel() < rows * columns:
            self.memory[name] = torch.empty(rows * columns, dtype=dtype, device=self.h_NI.device)
        return self.memory[name][:rows * columns].view(rows, columns)
