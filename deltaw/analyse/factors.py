"""The sites of an adapter as plain matrices: ΔW = s·B A with A_RI and B_OR, whatever shape the base's weight has.

A convolution is flattened, stacked experts are one matrix each (`experts.gate[3]`), slices of a fused projection keep
their zeros. Biases, saved modules and grouped convolutions with an ungrouped A have no such form and are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from deltaw.core import Adapter
from deltaw.core.adapter import SiteDelta


@dataclass(frozen=True, eq=False, slots=True)
class Factors:
    """One ΔW = s·B A; O outputs, I inputs."""

    site: str
    """The site's name, with [e] behind it for the e-th of stacked experts."""
    kind: str
    """What the site's module is called: the last part of its name."""
    layer: int | None
    """The first number in the site's name, which counts layers; None where there is none."""
    A_RI: Tensor
    B_OR: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """R, the rank that the factors allow."""
        return self.A_RI.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.B_OR.shape[0], self.A_RI.shape[1]


def is_matrix(delta: SiteDelta) -> bool:
    """Whether a site's change is a product of two factors that has the form of its base's weight."""
    return delta.is_low_rank and not delta.geometry.is_dense_grouped(delta.A)


def factors_of(adapter: Adapter, site: str) -> tuple[Factors, ...]:
    """The matrices of a site: one, or one for each expert; none where it has no such form."""
    delta = adapter.sites[site]
    if not is_matrix(delta):
        return ()
    geometry, scale = delta.geometry, adapter.scaling(site)
    kind, layer = kind_and_layer(site)
    A, B, experts = delta.A, delta.B, geometry.experts
    if geometry.kind == "parameter" and experts > 1:
        A_ERI = A.reshape(experts, -1, A.shape[-1])
        B_EOR = B.reshape(B.shape[0], -1, experts).permute(2, 0, 1)
        return tuple(Factors(f"{site}[{e}]", kind, layer, A_ERI[e], B_EOR[e], scale) for e in range(experts))
    return (Factors(site, kind, layer, A.flatten(1), geometry.dense_out(B.flatten(1)), scale),)


def all_factors(adapter: Adapter) -> Iterator[Factors]:
    """The matrices of every site in the adapter's order."""
    for site in adapter.sites:
        yield from factors_of(adapter, site)


def kind_and_layer(site: str) -> tuple[str, int | None]:
    """The last part of a dotted name, and its first part that is a number.

    >>> kind_and_layer("model.layers.11.self_attn.q_proj")
    ('q_proj', 11)
    """
    parts = site.split(".")
    numbers = [int(part) for part in parts if part.isdecimal()]
    return parts[-1], numbers[0] if numbers else None
