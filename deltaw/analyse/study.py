"""`analyse`: everything there is to say of some adapters, in one pass over their sites.

Sites are taken one at a time, with the directions of all adapters and the weight of that site alone in memory, so that
an adapter of a large model needs little more than its own size.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from deltaw.analyse.amplification import Amplification, amplification
from deltaw.analyse.budget import Share, by_kind, by_layer
from deltaw.analyse.factors import Factors, factors_of, is_matrix, kind_and_layer
from deltaw.analyse.intruders import Intruders, intruders
from deltaw.analyse.pairs import SitePair, compare_sites
from deltaw.analyse.singular import Matrix, largest_singular
from deltaw.analyse.spectrum import Directions, SiteSpectrum, decompose, site_spectrum
from deltaw.analyse.subspace import random_similarity, subspace_similarity
from deltaw.analyse.weights import BaseWeights
from deltaw.core import Adapter
from deltaw.errors import ConfigError, Fault, near

BASE = "W"
"""In the place of an adapter's name: the base's own weight."""
SIDES = ("A", "B", "input", "output")
TOP_SHARE, TOP_MOST, MOST_KINDS = 0.1, 128, 4


@dataclass(frozen=True, kw_only=True, slots=True)
class SimilarityMap:
    """φ(i, j) at one site: i of the first's directions, j of the second's."""

    site: str
    first: str
    second: str
    """An adapter, or "W" for the base's weight."""
    side: str
    """A, B (singular vectors of the factor), input, output (of ΔW), or random (Gaussian matrices of the same size)."""
    dimension: int
    """Of the space that the directions lie in."""
    phi: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterStudy:
    """One adapter by itself, and beside its base where that was read."""

    name: str
    base: str
    """The base that it records."""
    ranks: tuple[int, ...]
    """The different ranks of its sites."""
    seed: int | None
    """The seed of its training, where it is recorded."""
    parameters: int
    """All of its values."""
    sites: tuple[SiteSpectrum, ...]
    layers: tuple[Share, ...]
    kinds: tuple[Share, ...]
    left_out: tuple[str, ...]
    """Sites that are no product of two factors: biases, saved modules, ungrouped changes of grouped convolutions."""
    against_base: tuple[Amplification, ...] = ()
    intruders: tuple[Intruders, ...] = ()

    @property
    def frobenius(self) -> float:
        """‖ΔW‖_F over all sites."""
        return math.sqrt(sum(site.frobenius**2 for site in self.sites))


@dataclass(frozen=True, kw_only=True, slots=True)
class PairStudy:
    """Two adapters beside each other at the sites that both change."""

    first: str
    second: str
    sites: tuple[SitePair, ...]
    cosine: float | None
    """Cosine of the whole changes, over the shared sites."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Analysis:
    """What `analyse` found."""

    adapters: tuple[AdapterStudy, ...]
    pairs: tuple[PairStudy, ...]
    maps: tuple[SimilarityMap, ...]
    drawn: tuple[str, ...]
    """The sites whose similarity maps are given."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = asdict(self)
        for study, found in zip(self.adapters, values["adapters"], strict=True):
            found["frobenius"] = study.frobenius
            for row, shown in zip(study.against_base, found["against_base"], strict=True):
                shown |= {"factor": row.factor, "relative": row.relative}
            for site, shown in zip(study.intruders, found["intruders"], strict=True):
                shown["count"] = site.count
        return values


def analyse(adapters: Mapping[str, Adapter], weights: Mapping[str, BaseWeights] | None = None, *,
            sites: Sequence[str] = (), top: int = 10, epsilon: float = 0.5, seed: int = 0,
            progress: Callable[[int, int], None] | None = None) -> Analysis:
    """Spectra, budgets, pairs and, with the base's `weights` by adapter, amplification and intruders.

    `sites` names those whose similarity maps are wanted; by default the one in the middle layer of each kind, as the
    paper shows the 48th of 96 layers. `top` and `epsilon` are the intruders'; `seed` draws the random comparisons.
    `progress` is called with the sites done and their number. Raises ConfigError for a site that no adapter has.
    """
    return _Study(adapters, weights or {}, sites, top, epsilon, torch.Generator().manual_seed(seed)).run(progress)


class _Study:
    def __init__(self, adapters: Mapping[str, Adapter], weights: Mapping[str, BaseWeights], sites: Sequence[str],
                 top: int, epsilon: float, generator: torch.Generator) -> None:
        self.adapters, self.weights, self.top, self.epsilon = adapters, weights, top, epsilon
        self.generator = generator
        self.drawn = tuple(sites) or middle_sites(adapters)
        known = {factors.site for adapter in adapters.values() for site in adapter.sites
                 for factors in factors_of(adapter, site)} if sites else set(self.drawn)
        if unknown := [Fault("sites", f"got '{site}'", "a site of an adapter", near(site, known))
                       for site in self.drawn if site not in known]:
            raise ConfigError(*unknown)
        self.spectra: dict[str, list[SiteSpectrum]] = defaultdict(list)
        self.against: dict[str, list[Amplification]] = defaultdict(list)
        self.intruding: dict[str, list[Intruders]] = defaultdict(list)
        self.paired: dict[tuple[str, str], list[SitePair]] = {p: [] for p in combinations(adapters, 2)}
        self.maps: list[SimilarityMap] = []

    def run(self, progress: Callable[[int, int], None] | None) -> Analysis:
        names = list(dict.fromkeys(site for adapter in self.adapters.values() for site in adapter.sites))
        for done, site in enumerate(names, 1):
            here = {name: factors_of(adapter, site) for name, adapter in self.adapters.items() if site in adapter.sites}
            W = next((w for name in here if name in self.weights and (w := self.weights[name].matrices(site))), ())
            for part in range(max(map(len, here.values()), default=0)):
                factors = {name: parts[part] for name, parts in here.items() if part < len(parts)}
                self._site(factors, W[part] if part < len(W) else None)
            if progress is not None:
                progress(done, len(names))
        return Analysis(adapters=tuple(self._adapter(name) for name in self.adapters), maps=tuple(self.maps),
                        pairs=tuple(self._pair(*pair) for pair in self.paired), drawn=self.drawn)

    def _site(self, factors: Mapping[str, Factors], W_OI: Tensor | None) -> None:
        directions = {name: decompose(f) for name, f in factors.items()}
        for name, f in factors.items():
            self.spectra[name].append(site_spectrum(f, directions[name].S_K))
        for one, other in combinations(factors, 2):
            if factors[one].shape == factors[other].shape:
                pair = directions[one], directions[other]
                self.paired[one, other].append(compare_sites(factors[one], factors[other], *pair))
                self._draw(factors[one], one, other, *pair)
        if W_OI is not None:
            self._against_base(factors, directions, W_OI)

    def _draw(self, factors: Factors, first: str, second: str, one: Directions, other: Directions) -> None:
        """The maps of two adapters at a site that is wanted: each side, and random matrices of the same size."""
        if factors.site not in self.drawn or not min(one.S_K.numel(), other.S_K.numel()):
            return
        for side in SIDES:
            u, v = one.side(side), other.side(side)
            self._add_map(factors.site, first, second, side, subspace_similarity(u, v), u.shape[0])
        size = factors.shape[1]
        drawn = random_similarity(size, one.A_IK.shape[1], other.A_IK.shape[1], self.generator)
        self._add_map(factors.site, first, second, "random", drawn, size)

    def _against_base(self, factors: Mapping[str, Factors], directions: Mapping[str, Directions],
                      W_OI: Tensor) -> None:
        wanted = max(d.S_K.numel() for d in directions.values())
        count = max(wanted, min(TOP_MOST, math.ceil(TOP_SHARE * min(W_OI.shape))))
        top = largest_singular(Matrix(W_OI), count, self.generator)
        for name, f in factors.items():
            row = amplification(f, directions[name], W_OI, top, self.generator)
            if row is None:
                continue
            self.against[name].append(row)
            self.intruding[name].append(intruders(f, W_OI, self.generator, top=self.top, epsilon=self.epsilon))
            if f.site in self.drawn:
                phi = subspace_similarity(directions[name].V_IK, top.V_IK)
                self._add_map(f.site, name, BASE, "input", phi, f.shape[1])

    def _add_map(self, site: str, first: str, second: str, side: str, phi: Tensor, dimension: int) -> None:
        self.maps.append(SimilarityMap(site=site, first=first, second=second, side=side, dimension=dimension,
                                       phi=tuple(tuple(row) for row in phi.tolist())))

    def _adapter(self, name: str) -> AdapterStudy:
        adapter, spectra = self.adapters[name], tuple(self.spectra[name])
        left_out = tuple(site for site, delta in adapter.sites.items() if not is_matrix(delta))
        return AdapterStudy(
            name=name, base=str(adapter.facts.get("base_model") or ""), seed=_seed(adapter),
            ranks=tuple(sorted({s.rank for s in spectra})), parameters=adapter.num_parameters, sites=spectra,
            layers=by_layer(spectra), kinds=by_kind(spectra), left_out=left_out,
            against_base=tuple(self.against[name]), intruders=tuple(self.intruding[name]))

    def _pair(self, first: str, second: str) -> PairStudy:
        sites = tuple(self.paired[first, second])
        shared = {row.site for row in sites}
        norms = [{s.site: s.frobenius for s in self.spectra[name] if s.site in shared} for name in (first, second)]
        squares = [sum(norm**2 for norm in found.values()) for found in norms]
        inner = sum(row.cosine * norms[0][row.site] * norms[1][row.site] for row in sites if row.cosine is not None)
        cosine = inner / math.sqrt(squares[0] * squares[1]) if min(squares) > 0 else None
        return PairStudy(first=first, second=second, sites=sites, cosine=cosine)


def middle_sites(adapters: Mapping[str, Adapter]) -> tuple[str, ...]:
    """For each kind of site (the first four) the site in the middle of the layers that have it."""
    of_kind: dict[str, dict[str, int]] = defaultdict(dict)
    for adapter in adapters.values():
        for site in adapter.sites:
            kind, layer = kind_and_layer(site)
            if factors := factors_of(adapter, site):
                of_kind[kind].setdefault(factors[0].site, -1 if layer is None else layer)
    found = []
    for sites in list(of_kind.values())[:MOST_KINDS]:
        ordered = sorted(sites, key=lambda site: sites[site])
        found.append(ordered[len(ordered) // 2])
    return tuple(found)


def _seed(adapter: Adapter) -> int | None:
    """The seed that a training recorded."""
    training = adapter.facts.get("training")
    config = training.get("config") if isinstance(training, dict) else None
    seed = config.get("seed") if isinstance(config, dict) else None
    return seed if isinstance(seed, int) else None
