"""Convolutions: the weight (O, I/groups, k...) read as an O × (I/groups·k) matrix.

A is a convolution to R channels with the host's kernel, stride, padding and dilation; B mixes those channels, 1×1. With
groups, every group runs through the same A, and each output has its own row of B, which is exactly s·BA in the grouped
weight's own shape: any rank, depthwise too, and it merges. PEFT's files hold another form for groups, an A over all
input channels and a grouped B; it is run as such, and cannot be merged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from deltaw.core.layers.adapted import Adapted
from deltaw.core.layers.slots import LowRank

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class AdaptedConv(Adapted):
    """y = W₀∗x + s·B(A∗x) on (N, I, ...) → (N, O, ...), or without N."""

    def add_low_rank(self, y: Tensor, x: Tensor, slot: LowRank, weight: float) -> Tensor:
        """The change of every output position, with dropout on x in training."""
        dtype = x.dtype if self.state.compute_dtype is None else self.state.compute_dtype
        if slot.dropout and self.training:
            x = F.dropout(x, slot.dropout)
        A, B = (factor.to(dtype) for factor in slot.factors())
        batched = x.dim() == A.dim()
        x_NI = x.to(dtype) if batched else x.to(dtype).unsqueeze(0)
        change = self._change(x_NI, A, B, slot) * (slot.scaling * weight)
        return y + (change if batched else change.squeeze(0)).to(y.dtype)

    def _change(self, x: Tensor, A: Tensor, B: Tensor, slot: LowRank) -> Tensor:
        groups = slot.geometry.groups
        if groups == 1 or slot.geometry.is_dense_grouped(A):
            h = self._convolve(x, A)
        else:
            apart = x.reshape(x.shape[0] * groups, x.shape[1] // groups, *x.shape[2:])
            h = self._convolve(apart, A)
            h = h.reshape(x.shape[0], groups * A.shape[0], *h.shape[2:])
        return _CONV[A.dim() - 2](h, B, groups=groups)

    def _convolve(self, x: Tensor, A: Tensor) -> Tensor:
        host: Any = self.host
        padding = host.padding
        if host.padding_mode != "zeros":
            x, padding = F.pad(x, host._reversed_padding_repeated_twice, mode=host.padding_mode), 0
        return _CONV[A.dim() - 2](x, A, None, host.stride, padding, host.dilation)
