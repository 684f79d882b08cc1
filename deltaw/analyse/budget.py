"""Where the parameters went and where the change happened: the sites of an adapter summed by layer and by kind."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from deltaw.analyse.spectrum import SiteSpectrum


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """A group of sites."""

    name: str
    """The layer's number, or the kind."""
    sites: int
    parameters: int
    """Values in their factors."""
    parameter_share: float
    """Of the adapter's factors."""
    frobenius: float
    """√Σ‖ΔW‖_F²."""
    change_share: float
    """Of Σ‖ΔW‖_F² over the adapter: the part of the whole change that happened here."""
    effective_rank: float
    """Mean over its sites."""


def by_layer(spectra: Sequence[SiteSpectrum]) -> tuple[Share, ...]:
    """One share for each layer, in order; sites outside any layer are "-"."""
    return _grouped(spectra, lambda s: (s.layer is None, s.layer or 0), lambda s: "-" if s.layer is None else
                    str(s.layer))


def by_kind(spectra: Sequence[SiteSpectrum]) -> tuple[Share, ...]:
    """One share for each kind of site, in the order of their first appearance."""
    order = list(dict.fromkeys(s.kind for s in spectra))
    return _grouped(spectra, lambda s: order.index(s.kind), lambda s: s.kind)


def _grouped(spectra: Sequence[SiteSpectrum], key: Callable[[SiteSpectrum], Hashable],
             name: Callable[[SiteSpectrum], str]) -> tuple[Share, ...]:
    groups: dict[str, list[SiteSpectrum]] = defaultdict(list)
    for spectrum in sorted(spectra, key=key):  # type: ignore[arg-type]  # every key here can be ordered
        groups[name(spectrum)].append(spectrum)
    parameters = sum(s.parameters for s in spectra)
    square = sum(s.frobenius**2 for s in spectra)
    found = []
    for label, members in groups.items():
        own = sum(s.frobenius**2 for s in members)
        count = sum(s.parameters for s in members)
        found.append(Share(
            name=label, sites=len(members), parameters=count, parameter_share=count / parameters,
            frobenius=math.sqrt(own), change_share=own / square if square else 0.0,
            effective_rank=sum(s.effective_rank for s in members) / len(members)))
    return tuple(found)
