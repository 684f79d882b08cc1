"""AdamW over tensors that lie end to end in one memory, as an adapter's do in a bank: a row is updated as one tensor.

An adapter has hundreds of small tensors, and what a kernel costs is by the tensor: for 64 adapters in one step that was
most of what they took beyond one. The numbers are the same, tensor by tensor or at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

_BLOCK = 64
"""Values whose squares are summed in float32; the rest of a sum is in float64."""
_PART = 1 << 18
"""Values of a long tensor that are taken at once: as float32 they stay in the cache."""


def gradient_norm(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> Tensor:
    """The 2-norm (float32) of the gradients of all parameters, which are the optimizer's; zero where there are none.

    To ten digits before it is rounded: a run is then cut alike whether its gradients lie in rows or not.
    """
    rows = optimizer.rows(for_step=True) if isinstance(optimizer, RowAdamW) else None
    if rows is not None:
        norms = [_norm(row.gradients) for row in rows]
    else:
        norms = _norms([p.grad for p in parameters if p.grad is not None]) or [torch.zeros(())]
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    return total.float()


def _norms(grads: Sequence[Tensor]) -> list[Tensor]:
    """The 2-norms of these tensors, long ones in parts; for a number of those one call for all takes far longer."""
    short = [g for g in grads if not _is_long(g)]
    norms = list(torch._foreach_norm(short, 2, dtype=torch.float64)) if short else []
    return norms + [_norm(part.to(torch.promote_types(part.dtype, torch.float32)))
                    for g in grads if _is_long(g) for part in torch.split(g.reshape(-1), _PART)]


def _is_long(g: Tensor) -> bool:
    return g.is_cpu and g.numel() >= _PART


def _norm(row: Tensor) -> Tensor:
    """The 2-norm of a long row of float32, in float64."""
    whole = len(row) - len(row) % _BLOCK
    blocks = torch.linalg.vector_norm(row[:whole].view(-1, _BLOCK), dim=1).double()
    total: Tensor = torch.linalg.vector_norm(torch.cat([blocks, row[whole:].double()]))
    return total


@dataclass(frozen=True, eq=False)
class Row:
    """A group's parameters end to end, and with them their gradients, moments and steps."""

    members: Sequence[nn.Parameter]
    """In the order in which they lie."""
    grads: Sequence[Tensor]
    values: Tensor
    gradients: Tensor
    mean: Tensor
    square: Tensor
    steps: Tensor
    """One for each member; all are the same."""
    step: Tensor
    """The first member's."""

    def is_current(self, state: Mapping[Tensor, Mapping[str, Tensor]], *, ends_alone: bool) -> bool:
        """Whether everything is still where it was, or its first and its last member at least."""
        first = self.members[0]
        step = max(1, len(self.members) - 1) if ends_alone else 1
        return (first.data_ptr() == self.values.data_ptr() and state[first].get("step") is self.step
                and all(p.grad is grad for p, grad in zip(self.members[::step], self.grads[::step], strict=True)))


class RowAdamW(torch.optim.AdamW):
    """A fused AdamW; where each group's parameters and gradients lie end to end, a group is one call."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rows: list[Row] = []
        self._checked = False

    def rows(self, *, for_step: bool = False) -> list[Row] | None:
        """Every group as a row; None where some do not lie so, or have no gradient.

        Asked `for_step`, the next step takes them as they are: asking thousands of tensors twice takes as long as it.
        """
        checked, self._checked = self._checked, for_step
        if not (self._rows and all(row.is_current(self.state, ends_alone=checked) for row in self._rows)):
            self._rows = _rows(self.param_groups, self.state)
        return self._rows or None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's."""
        self._checked = False
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step, as torch's."""
        rows = None if closure is not None else self.rows()
        if rows is None:
            loss: float | None = super().step(closure)
            return loss
        for group, row in zip(self.param_groups, rows, strict=True):
            row.steps.add_(1)
            torch._fused_adamw_([row.values], [row.gradients], [row.mean], [row.square], [], [row.step],
                                amsgrad=False, lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1],
                                weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
                                grad_scale=getattr(self, "grad_scale", None), found_inf=None)
        return None


def _rows(groups: Sequence[Mapping[str, Any]], state: MutableMapping[Tensor, dict[str, Tensor]]) -> list[Row]:
    """All groups as rows, their moments moved to where they lie end to end; none if one cannot be."""
    found = []
    for group in groups:
        members = sorted(group["params"], key=Tensor.data_ptr)
        grads = [p.grad for p in members if p.grad is not None]
        if len(grads) < len(members) or not group["fused"] or group["amsgrad"] or group["maximize"]:
            return []
        values, gradients = end_to_end(members), end_to_end(grads)
        # What torch has stepped in part is left to torch.
        if values is None or gradients is None or len({float(state[p].get("step", 0.0)) for p in members}) > 1:
            return []
        found.append((members, grads, values, gradients))
    return [Row(*parts, *_moments(parts[0], state)) for parts in found]


def end_to_end(tensors: Sequence[Tensor]) -> Tensor | None:
    """Tensors that lie one after the other in one memory, in this order, as a flat view; None where they do not."""
    first = tensors[0]
    at, size = first.data_ptr(), first.element_size()
    for tensor in tensors:
        if tensor.data_ptr() != at or tensor.dtype != first.dtype or not tensor.is_contiguous():
            return None
        at += tensor.numel() * size
    memory = first.untyped_storage()
    if at > memory.data_ptr() + memory.nbytes():  # two memories that touch
        return None
    return first.detach().as_strided(((at - first.data_ptr()) // size,), (1,))


def _moments(members: Sequence[nn.Parameter],
             state: MutableMapping[Tensor, dict[str, Tensor]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both moments and the steps end to end, with what was there; the state's tensors become views of them."""
    ends = list(accumulate(p.numel() for p in members))
    mean, square = (members[0].detach().new_zeros(ends[-1]) for _ in range(2))
    steps = torch.zeros(len(members), device=mean.device)
    for number, (parameter, end) in enumerate(zip(members, ends, strict=True)):
        span = slice(end - parameter.numel(), end)
        made = {"step": steps[number], "exp_avg": mean[span].view(parameter.shape),
                "exp_avg_sq": square[span].view(parameter.shape)}
        for key, tensor in state[parameter].items():
            made[key].copy_(tensor)
        state[parameter] = made
    return mean, square, steps, state[members[0]]["step"]
