"""A site's factors as PEFT's file holds them, and back.

Most are held as they are. Three are not, because PEFT knows fewer shapes than deltaw:

    slices            A (n·R, I) and B spread out to (O, n·R), of rank n·R
    grouped conv      A (R, I/g, k...) shared by the groups becomes dense, (g·R, I, k...): group j reads its channels
    attention         both projections must be there and of one rank and scale: zeros are added, B is rescaled,
                      and out_proj's B is halved, since PEFT adds its change twice

The scale of a site never changes: a file's alpha is the one that gives the same s at the file's rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deltaw.core.geometry import Geometry

OUT_PROJ_COUNTS = 2.0
"""How often PEFT adds the change of an attention's out_proj: through 0.21.2 its layer adds it, and the projection's own
layer adds it again. An adapter that PEFT trained was trained so, and must do here what it does there."""
OUT_PROJ_TWICE_UNTIL = (0, 21, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFactors:
    """Factors in the file's form: ΔW = scale · BA with a rank that PEFT computes alpha / rank from."""

    A: Tensor
    B: Tensor
    rank: int
    """The r of PEFT's config at this site."""
    scale: float
    """s of ΔW = s·BA."""
    gain: float = 1.0
    """B is this much larger than the site's own."""


def to_file(A: Tensor, B: Tensor, geometry: Geometry, scale: float) -> FileFactors:
    """The factors of one site in the file's form."""
    rank = geometry.rank_of(A, B)
    if geometry.slices:
        return FileFactors(A=A, B=geometry.dense_out(B), rank=rank * len(geometry.slices), scale=scale)
    if geometry.kind == "conv" and geometry.groups > 1 and not geometry.is_dense_grouped(A):
        return FileFactors(A=_spread_groups(A, geometry.groups), B=B, rank=rank * geometry.groups, scale=scale)
    return FileFactors(A=A, B=B, rank=rank, scale=scale)


def pair_up(in_proj: FileFactors, out_proj: FileFactors) -> tuple[FileFactors, FileFactors]:
    """The two projections of an attention at one rank and one scale, that of the larger rank."""
    rank = max(in_proj.rank, out_proj.rank)
    scale = in_proj.scale if in_proj.rank == rank else out_proj.scale
    return (_padded(in_proj, rank, scale, in_proj.scale / scale),
            _padded(out_proj, rank, scale, out_proj.scale / scale / OUT_PROJ_COUNTS))


def no_change(partner: FileFactors, site: str) -> FileFactors:
    """Zero factors for the projection that an adapter leaves alone: in_proj is 3E × E, out_proj E × E."""
    width = partner.A.shape[1]
    out = width if site.endswith("out_proj") else 3 * width
    return replace(partner, A=partner.A.new_zeros(partner.rank, width), B=partner.B.new_zeros(out, partner.rank))


def from_file(A: Tensor, B: Tensor, geometry: Geometry, rank: int, gain: float = 1.0) -> tuple[Tensor, Tensor] | None:
    """A site's own factors of this rank, or None where the file's do not have the form that `to_file` gives them."""
    if gain != 1.0:
        B = B / gain
    columns = rank * len(geometry.slices or (0,))
    if geometry.kind == "attention" and columns < A.shape[0] == B.shape[1]:
        if torch.count_nonzero(A[columns:]) or torch.count_nonzero(B[:, columns:]):
            return None
        A, B = A[:columns].clone(), B[:, :columns].contiguous()
    if geometry.slices:
        if B.shape != (geometry.out_features, columns):
            return None
        compact = geometry.compact_out(B)
        return None if compact is None else (A, compact)
    if geometry.kind == "conv" and geometry.groups > 1 and A.shape[0] == rank * geometry.groups:
        shared = shared_groups(A, geometry.groups)
        return None if shared is None else (shared, B)
    return A, B


def shared_groups(A: Tensor, groups: int) -> Tensor | None:
    """The one A that all groups of a dense grouped A share; None where they differ or read each other's channels."""
    if A.shape[0] % groups or A.shape[1] % groups:
        return None
    shared = A[:A.shape[0] // groups, :A.shape[1] // groups].contiguous()
    return shared if torch.equal(_spread_groups(shared, groups), A) else None


def _spread_groups(A: Tensor, groups: int) -> Tensor:
    rank, channels = A.shape[:2]
    dense = A.new_zeros(groups * rank, groups * channels, *A.shape[2:])
    for j in range(groups):
        dense[j * rank:(j + 1) * rank, j * channels:(j + 1) * channels] = A
    return dense


def _padded(factors: FileFactors, rank: int, scale: float, gain: float) -> FileFactors:
    """The factors at a larger rank, with zeros, and B larger by this gain, for another scale."""
    missing = rank - factors.rank
    pad = torch.nn.functional.pad
    B = factors.B if gain == 1.0 else factors.B * gain
    return FileFactors(A=pad(factors.A, (0, 0, 0, missing)), B=pad(B, (0, missing)), rank=rank, scale=scale, gain=gain)
