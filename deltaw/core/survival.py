"""What merging did to one tensor, in figures: how large its change was, and how much of it rounding kept.

W₀ is what the base computed with, S = stored - W₀ the change that is there afterwards, ΔW the one that was meant:

    survived   ⟨S, ΔW⟩ / ‖ΔW‖²     1: all of the change is there; 0: nothing of it, whatever else moved
    lost       ‖S - ΔW‖ / ‖ΔW‖     all that is different from what was meant, noise of rounding included

They answer two questions. A 4-bit base lies on its grid: a change smaller than half a step rounds back to where it was,
and `survived` sees it gone. But noise that rounding adds in other directions than the change's does not take the change
away, as `lost` alone, which then exceeds 1, would have one think. Survival is what a merge is refused for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_SURVIVAL = 0.5
"""Share of the change of all packed weights together, by energy, below which a merge into them is refused."""
_COUNTED = 1 << 18
"""Values that are counted at a time: figures must not cost more memory than the work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteChange:
    """What merging did to one tensor."""

    site: str
    tensor: str
    """Its name in the merged folder."""
    dtype: str
    """What it is stored as: "BF16", or how it is packed, "nf4"."""
    shape: tuple[int, ...]
    entries: int
    """Number of its values."""
    changed: int
    """How many of them are stored differently than the base's would be."""
    largest: float
    """The largest |ΔW|, before rounding."""
    norm: float
    """‖ΔW‖, before rounding."""
    survived: float
    """⟨stored change, ΔW⟩ / ‖ΔW‖²: the share of the change that survived rounding."""
    lost: float
    """‖stored change - ΔW‖ / ‖ΔW‖: how much of the change rounding to the dtype lost or bent."""
    packed: bool = False
    """It was rounded to a quantizer's few values."""


def change_of(site: str, tensor: str, dtype: str, *, base: Tensor | None, wide: Tensor, stored: Tensor,
              packed: bool = False) -> SiteChange:
    """The figures of one tensor: `base` before, `wide` what was meant, `stored` what it became, as values.

    Where there was no base of this shape all of it is new, and nothing of a change is lost.
    """
    entries = stored.numel()
    if base is None or base.shape != stored.shape:
        largest = float(wide.abs().max()) if entries else 0.0
        return SiteChange(site=site, tensor=tensor, dtype=dtype, shape=tuple(stored.shape), entries=entries,
                          changed=entries, largest=largest, norm=0.0, survived=1.0, lost=0.0)
    total = torch.promote_types(base.dtype, torch.float32)
    changed, largest, square, bent, along = 0, 0.0, 0.0, 0.0, 0.0
    for before, exact, after in zip(*(torch.split(t.reshape(-1), _COUNTED) for t in (base, wide, stored)), strict=True):
        delta = exact.to(total) - before.to(total)
        kept = after.to(total) - before.to(after.dtype).to(total)
        changed += int(kept.count_nonzero())
        largest = max(largest, float(torch.linalg.vector_norm(delta, math.inf)))
        square += float(torch.linalg.vector_norm(delta)) ** 2
        bent += float(torch.linalg.vector_norm(kept - delta)) ** 2
        along += float(torch.dot(kept, delta))
    return SiteChange(site=site, tensor=tensor, dtype=dtype, shape=tuple(stored.shape), entries=entries,
                      changed=changed, largest=largest, norm=square**0.5, survived=along / square if square else 1.0,
                      lost=(bent / square) ** 0.5 if square else 0.0, packed=packed)


def survival(changes: Iterable[SiteChange]) -> float | None:
    """The share of the change that survived, of all packed tensors together by energy; None where none is packed."""
    rounded = [change for change in changes if change.packed]
    energy = sum(change.norm**2 for change in rounded)
    if not rounded:
        return None
    return sum(change.survived * change.norm**2 for change in rounded) / energy if energy else 1.0


def worst(changes: Iterable[SiteChange], count: int) -> list[SiteChange]:
    """The packed tensors of which the least survived."""
    return sorted((change for change in changes if change.packed), key=lambda change: change.survived)[:count]
