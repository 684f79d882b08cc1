"""What a loss is made of beside the likelihood, and its definition in plain operations on whole logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Terms:
    """What is added to the negative log-likelihood; nothing by default."""

    smoothing: float = 0.0
    """ε: the share of a label's weight that is spread over the vocabulary."""
    z_loss: float = 0.0
    """ζ: the weight of the squared log-partition, which keeps logits from drifting."""

    def each(self, z_NV: Tensor, targets_N: Tensor) -> Tensor:
        """The loss (N,) of each token from its logits in plain operations, in float32 or wider."""
        z_NV = z_NV.to(torch.promote_types(z_NV.dtype, torch.float32))
        losses_N = F.cross_entropy(z_NV, targets_N, reduction="none", label_smoothing=self.smoothing)
        return losses_N + self.z_loss * z_NV.logsumexp(1).square() if self.z_loss else losses_N

    def loss(self, z_NV: Tensor, targets_N: Tensor) -> Tensor:
        """The summed loss of logits in plain operations, in float32 or wider."""
        z_NV = z_NV.to(torch.promote_types(z_NV.dtype, torch.float32))
        total = F.cross_entropy(z_NV, targets_N, reduction="sum", label_smoothing=self.smoothing)
        return total + self.z_loss * z_NV.logsumexp(1).square().sum() if self.z_loss else total
