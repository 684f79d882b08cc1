"""Cross entropy from hidden states, a stretch of tokens at a time: the logits of a batch never exist together.

    ℓ = (1-ε)·(lse(z) - z_t) + ε·(lse(z) - mean z) + ζ·lse(z)²        z = head(h), t the next token

The logits of 1,024 tokens over a vocabulary of 49,152 take 200 MB, and plain autograd makes that four times. Here both
the loss and its gradient are computed while a stretch's logits are at hand, in one buffer that all stretches use, and
where logits are narrower than float32 in a second one, which on a processor is a few rows and stays in its cache; none
where a kernel (`native_loss`) takes a row in float32 as it reads it. For a linear head, frozen or trained, gradients
are written out,

    dz = p - (1-ε)·1_t - ε/V + 2ζ·lse·p,  dh = dz W,  dW = dzᵀ h,

and for any other (adapted, scaled or capped) it is taken by autograd, one stretch at a time. A head that is packed in
8 bits is passed over once, a strip of the vocabulary at a time (`deltaw.train.strip_entropy`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.frozen import write_product, write_transposed
from deltaw.core.layers import CHILD, AdaptedLinear
from deltaw.core.stretches import stretch_of
from deltaw.core.tables import PackedHead
from deltaw.train import native_loss
from deltaw.train.strip_entropy import passed_over
from deltaw.train.terms import Terms

_BLOCK = 16
"""Rows of a stretch whose logarithms are taken at once by a processor, in its cache; a GPU takes them all."""


def as_is(logits: Tensor) -> Tensor:
    """What most models do to their logits after the output layer."""
    return logits


class OutputLayer:
    """The module that turns hidden states (N, I) into logits (N, V), and what the model does with them after it."""

    def __init__(self, head: nn.Module, finish: Callable[[Tensor], Tensor] = as_is) -> None:
        self.head, self.finish = head, finish

    def logits(self, h_NI: Tensor) -> Tensor:
        """The model's logits."""
        return self.finish(self.head(h_NI))

    def trained(self) -> list[Tensor]:
        """Tensors of the layer that want a gradient and take part."""
        own = self.head._parameters.values() if self._is_idle else self.head.parameters()
        return [p for p in own if p is not None and p.requires_grad]

    @property
    def vocabulary(self) -> int:
        """V."""
        return int(self.head.get_parameter("weight").shape[0])

    @property
    def is_linear(self) -> bool:
        """Whether it is a product with a weight and nothing else, now."""
        return (self.finish is as_is and self._is_idle
                and type(self.head).forward in (nn.Linear.forward, PackedHead.forward)
                and not self.head._forward_hooks and not self.head._forward_pre_hooks)

    @property
    def is_plain(self) -> bool:
        """Whether it is such a product, and frozen."""
        return self.is_linear and not self.trained()

    @property
    def _is_idle(self) -> bool:
        """Whether the layer runs the forward of its class, or would but for adapters none of which is on."""
        adapted, replaced = self.head._modules.get(CHILD), self.head.__dict__.get("forward")
        if isinstance(adapted, AdaptedLinear) and replaced == adapted.forward:
            return adapted.own_forward is None and not adapted.active()
        return replaced is None


def token_loss(h_NI: Tensor, targets_N: Tensor, layer: OutputLayer, terms: Terms | None = None) -> Tensor:
    """The loss summed over N tokens; a scalar in float32, or float64 for such hidden states."""
    terms = terms if terms is not None else Terms()
    trained = layer.trained()
    if torch.is_grad_enabled() and (h_NI.requires_grad or trained):
        total: Tensor = _TokenLoss.apply(h_NI, targets_N, layer, terms, *trained)  # type: ignore[no-untyped-call]
        return total
    return _Sums(h_NI, targets_N, layer, terms).total


def token_losses(h_NI: Tensor, targets_N: Tensor, layer: OutputLayer, terms: Terms | None = None) -> Tensor:
    """The loss of each of N tokens, (N,), through a plain output layer (`OutputLayer.is_plain`)."""
    assert layer.is_plain, "the gradient of each token by itself is written out for a frozen linear head only"
    losses: Tensor = _TokenLosses.apply(  # type: ignore[no-untyped-call]
        h_NI, targets_N, layer, terms if terms is not None else Terms())
    return losses


class _TokenLosses(torch.autograd.Function):
    """Losses whose gradients, one row of h for each, are ready before they are asked for."""

    @staticmethod
    def forward(ctx: Any, h_NI: Tensor, targets_N: Tensor, layer: OutputLayer, terms: Terms) -> Tensor:
        sums = _Sums(h_NI, targets_N, layer, terms, gradients=ctx.needs_input_grad[0], apart=True)
        ctx.dh_NI = sums.dh_NI
        return torch.cat(sums.losses) if sums.losses else h_NI.new_zeros(0, dtype=sums.wide)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[Tensor | None, ...]:
        # In place: a second matrix of h's size would be the largest of the whole pass.
        dh_NI = ctx.dh_NI.mul_(gradient_N.unsqueeze(1).to(ctx.dh_NI.dtype))
        del ctx.dh_NI
        return dh_NI, None, None, None


class _TokenLoss(torch.autograd.Function):
    """The loss, whose gradients are ready before they are asked for."""

    @staticmethod
    def forward(ctx: Any, h_NI: Tensor, targets_N: Tensor, layer: OutputLayer, terms: Terms,
                *trained: Tensor) -> Tensor:
        sums = _Sums(h_NI, targets_N, layer, terms, trained, gradients=True)
        ctx.gradients = (sums.dh_NI if h_NI.requires_grad else None, *sums.d_trained)
        return sums.total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        dh, *rest = (None if g is None else g.mul_(gradient) for g in ctx.gradients)  # in place: nobody else has them
        del ctx.gradients
        return (dh, None, None, None, *rest)


class _Sums:
    """The pass over all stretches."""

    def __init__(self, h_NI: Tensor, targets_N: Tensor, layer: OutputLayer, terms: Terms,
                 trained: Sequence[Tensor] = (), *, gradients: bool = False, apart: bool = False) -> None:
        self.losses: list[Tensor] | None = [] if apart else None
        self.wide = torch.promote_types(h_NI.dtype, torch.float32)
        self.layer, self.terms, self.trained, self.gradients = layer, terms, trained, gradients
        self.dh_NI = torch.empty_like(h_NI) if gradients else None
        self.d_trained: list[Tensor | None] = [None] * len(trained)
        if isinstance(layer.head, PackedHead) and layer.is_plain:
            self.total = self.packed(h_NI.detach(), targets_N, layer.head)
            return
        total = torch.zeros((), dtype=torch.float64, device=h_NI.device)
        linear, rows = layer.is_linear, stretch_of(len(h_NI), layer.vocabulary)
        self.buffers: dict[str, Tensor] = {}
        for start in range(0, len(h_NI), rows):
            stretch = slice(start, start + rows)
            add = self.linear if linear and h_NI.dtype == layer.head.weight.dtype else self.any
            total += add(h_NI[stretch].detach(), targets_N[stretch], stretch)
        self.total = total.to(self.wide)

    def packed(self, h_NI: Tensor, targets_N: Tensor, head: PackedHead) -> Tensor:
        """All tokens through a head in 8 bits."""
        losses_N = passed_over(h_NI, targets_N, head, self.terms, self.dh_NI)
        if self.losses is not None and len(losses_N):
            self.losses.append(losses_N)
        return losses_N.sum(dtype=torch.float64).to(self.wide)

    def linear(self, h_NI: Tensor, targets_N: Tensor, stretch: slice) -> Tensor:
        """A stretch through a linear head, with the gradients written out."""
        with torch.no_grad():
            W_VI, b_V = self.layer.head.get_parameter("weight"), self.layer.head._parameters.get("bias")
            z_NV = self.buffer("logits", len(h_NI), len(W_VI), h_NI.dtype)
            write_product(h_NI, W_VI, b_V, z_NV)
            if native_loss.fits(z_NV, targets_N):
                loss_N = native_loss.losses(z_NV, targets_N, self.terms, gradients=self.dh_NI is not None)
            else:
                block = _BLOCK if z_NV.is_cpu else max(1, len(z_NV))
                blocks = zip(torch.split(z_NV, block), torch.split(targets_N.unsqueeze(1), block), strict=True)
                loss_N = torch.cat([self.block(z, column) for z, column in blocks]).squeeze(1)
            if self.dh_NI is not None:
                write_transposed(z_NV, W_VI, self.dh_NI[stretch])
                self.d_trained = [_added(total, z_NV, h_NI if tensor is W_VI else None)
                                  for total, tensor in zip(self.d_trained, self.trained, strict=True)]
            if self.losses is not None:
                self.losses.append(loss_N)
            return loss_N.sum(dtype=torch.float64)

    def block(self, z_NV: Tensor, column_N1: Tensor) -> Tensor:
        """The loss (N, 1) of some logits, whose place their gradient takes."""
        log_p_NV = z_NV
        if z_NV.dtype != self.wide:
            log_p_NV = self.buffer("log p", len(z_NV), z_NV.shape[1], self.wide).copy_(z_NV)
        z_target_N1 = log_p_NV.gather(1, column_N1)
        torch.log_softmax(log_p_NV, 1, out=log_p_NV)
        log_p_target_N1 = log_p_NV.gather(1, column_N1)
        lse_N1 = z_target_N1 - log_p_target_N1
        eps, zeta = self.terms.smoothing, self.terms.z_loss
        loss_N1 = -(1 - eps) * log_p_target_N1
        if eps:
            loss_N1 -= eps * log_p_NV.mean(1, keepdim=True)
        if zeta:
            loss_N1 += zeta * lse_N1.square()
        if self.dh_NI is not None:
            dz_NV = log_p_NV.exp_()
            if zeta:
                dz_NV *= 1 + 2 * zeta * lse_N1
            if eps:
                dz_NV -= eps / z_NV.shape[1]
            dz_NV.scatter_add_(1, column_N1, torch.full_like(loss_N1, eps - 1))
            if dz_NV is not z_NV:
                z_NV.copy_(dz_NV)
        return loss_N1

    def any(self, h_NI: Tensor, targets_N: Tensor, stretch: slice) -> Tensor:
        """A stretch through whatever the output layer is."""
        if not self.gradients:
            return self.terms.loss(self.layer.logits(h_NI), targets_N).to(torch.float64)
        with torch.enable_grad():
            leaf = h_NI.requires_grad_()
            loss = self.terms.loss(self.layer.logits(leaf), targets_N)
            dh, *rest = torch.autograd.grad(loss, [leaf, *self.trained], allow_unused=True)
        if dh is not None and self.dh_NI is not None:
            self.dh_NI[stretch] = dh
        self.d_trained = [part if total is None else total if part is None else total.add_(part)
                          for total, part in zip(self.d_trained, rest, strict=True)]
        return loss.detach().to(torch.float64)

    def buffer(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """A buffer that the stretches share; the last one may need fewer rows."""
        if name not in self.buffers:
            device = self.layer.head.get_parameter("weight").device
            self.buffers[name] = torch.empty(rows, columns, dtype=dtype, device=device)
        return self.buffers[name][:rows]


def _added(total: Tensor | None, dz_NV: Tensor, h_NI: Tensor | None) -> Tensor:
    """dzᵀ h (V, I), the gradient of a weight, or where there is no h that of a bias (V,), added to what there is."""
    if h_NI is not None:
        return dz_NV.t() @ h_NI if total is None else total.addmm_(dz_NV.t(), h_NI)
    return dz_NV.sum(0) if total is None else total.add_(dz_NV.sum(0))
