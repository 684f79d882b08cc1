"""What the figures of an analysis say, in sentences. Every number in them is computed; none is a rule of thumb.

A direction counts as shared when more of it lies in the other span than four standard deviations above what a random
direction's share is: of a random unit vector in D dimensions, the share in a given span of J is Beta(J/2, (D-J)/2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from deltaw.analyse.study import BASE, AdapterStudy, Analysis, PairStudy, SimilarityMap

Section = Literal["size", "budget", "spectrum", "pair", "map", "base", "intruders"]


@dataclass(frozen=True, slots=True)
class Finding:
    """A sentence, and what it is about."""

    section: Section
    about: tuple[str, ...]
    """The adapters, and for a map its site and side."""
    text: str


def findings(analysis: Analysis) -> tuple[Finding, ...]:
    """Everything that can be said, in the order of the sections."""
    return (
        *(finding for study in analysis.adapters for finding in _of_adapter(study)),
        *(finding for pair in analysis.pairs for finding in _of_pair(pair)),
        *(Finding("map", (m.first, m.second, m.site, m.side), describe_map(m)) for m in analysis.maps
          if m.side != "random"),
    )


def _of_adapter(study: AdapterStudy) -> Iterator[Finding]:
    about = (study.name,)
    if not study.sites:
        return
    if study.frobenius == 0:
        yield Finding("size", about, f"{study.name} changes nothing: ΔW = 0 at every site, as before training.")
        return
    largest = max(study.sites, key=lambda s: s.frobenius)
    share = largest.frobenius**2 / study.frobenius**2
    yield Finding("size", about, f"{study.name} changes its base most at {largest.site} (‖ΔW‖ {largest.frobenius:.3g}, "
                  f"{share:.0%} of the whole ΣΔW²).")
    kind = max(study.kinds, key=lambda k: k.change_share)
    yield Finding("budget", about, f"{study.name}: "
                  f"{kind.name} holds {kind.parameter_share:.0%} of the parameters and makes "
                  f"{kind.change_share:.0%} of the change.")
    half = _half_of_layers(study)
    if half:
        yield Finding("budget", about, half)
    spread = median(s.effective_rank for s in study.sites)
    used = median(s.stable_rank for s in study.sites)
    ranks = "/".join(map(str, study.ranks))
    yield Finding("spectrum", about, f"{study.name}: "
                  f"at the median site the change is spread over {spread:.1f} of {ranks} directions "
                  f"(effective rank); its norm is that of {used:.1f} equally strong ones (stable rank).")
    yield from _of_base(study)


def _half_of_layers(study: AdapterStudy) -> str:
    """Which layers, the strongest first, make half of the change together."""
    layers = sorted((s for s in study.layers if s.name != "-"), key=lambda s: -s.change_share)
    if len(layers) < 3:
        return ""
    total, count = 0.0, 0
    for share in layers:
        total, count = total + share.change_share, count + 1
        if total >= 0.5:
            break
    names = ", ".join(sorted((s.name for s in layers[:count]), key=int)) if count <= 8 else ""
    return (f"{study.name}: "
            f"half of the change happens in {count} of {len(layers)} layers" + (f" ({names})" if names else "")
            + f"; evenly spread it would be {math.ceil(len(layers) / 2)}.")


def _of_base(study: AdapterStudy) -> Iterator[Finding]:
    rows = study.against_base
    if rows:
        factor, relative = median(r.factor for r in rows), median(r.relative for r in rows)
        through = [median(getattr(row, f"through_{name}") for row in rows) for name in ("change", "top", "random")]
        times = through[0] / through[2] if through[2] else math.inf
        yield Finding("base", (study.name,), f"{study.name}: "
                      f"at the median site ‖ΔW‖ is {relative:.2%} of ‖W‖. Seen through ΔW's "
                      f"directions W has a norm of {through[0]:.3g}: {times:.1f} times what it has through random ones "
                      f"({through[2]:.3g}), and {through[0] / through[1]:.0%} of what its own largest carry "
                      f"({through[1]:.3g}). The change amplifies what W has there by {factor:.3g}.")
        overlap, chance = median(r.top_overlap for r in rows), median(r.top_overlap_random for r in rows)
        yield Finding("base", (study.name,), f"{study.name}: {overlap:.0%} of ΔW's input span lies in that of W's "
                      f"{_range([r.top_count for r in rows])} largest directions; of a random span it would be "
                      f"{chance:.0%}.")
    if study.intruders:
        total, looked = sum(i.count for i in study.intruders), sum(len(i.cosines) for i in study.intruders)
        where = sum(i.count > 0 for i in study.intruders)
        said = (f"{study.name}: "
                f"{total} of the {looked} strongest directions of W + ΔW are intruders (no direction of W within "
                f"cosine {study.intruders[0].epsilon:g}), at {where} of {len(study.intruders)} sites.")
        lowest = min(study.intruders, key=lambda i: min(i.cosines))
        yield Finding("intruders", (study.name,), said + (
            "" if total else f" The least familiar one has cosine {min(lowest.cosines):.2f}, at {lowest.site}."))


def _of_pair(pair: PairStudy) -> Iterator[Finding]:
    rows = [row for row in pair.sites if row.cosine is not None]
    if not rows:
        yield Finding("pair", (pair.first, pair.second),
                      f"{pair.first} and {pair.second} share no site that both change.")
        return
    tops = {name: median(v for row in rows if (v := getattr(row, name)) is not None)
            for name in ("top_A", "top_input", "top_output")}
    whole, chance = median(row.whole_input or 0.0 for row in rows), median(row.random_input for row in rows)
    yield Finding("pair", (pair.first, pair.second), (
        f"As whole changes, {pair.first} and {pair.second} have the cosine {pair.cosine or 0.0:.2f}. At the median of "
        f"{len(rows)} shared sites their first input directions agree at φ {tops['top_input']:.2f} and their first "
        f"output directions at {tops['top_output']:.2f} (of A alone, {tops['top_A']:.2f}); the whole input spans at "
        f"{whole:.2f}, where random ones would at {chance:.2f}."))


def describe_map(found: SimilarityMap) -> str:
    """What one similarity map shows."""
    shares, count = shared_directions(found)
    chance = len(found.phi[0]) / found.dimension
    of = "W's largest" if found.second == BASE else f"{found.second}'s"
    first = (f"The first direction of {found.first} lies in the span of {of} {len(found.phi[0])} at {shares[0]:.2f} "
             f"(random: {chance:.2f})")
    if count == 0:
        return f"{first}; none of its {len(shares)} stands out from random ones."
    if count == len(shares):
        return f"{first}; all {count} stand out from random ones."
    beyond = shares[count:]
    return (f"{first}. {_leading(count)} {len(shares)} stand{'s' if count == 1 else ''} out from random ones; the "
            f"others lie in it at {sum(beyond) / len(beyond):.2f} on average.")


def shared_directions(found: SimilarityMap) -> tuple[list[float], int]:
    """How much of each of the first's directions lies in the second's whole span, and how many in front stand out."""
    J, D = len(found.phi[0]), found.dimension
    sums = [row[-1] * min(i, J) for i, row in enumerate(found.phi, 1)]
    shares = [after - before for before, after in zip([0.0, *sums], sums, strict=False)]
    chance = J / D
    limit = chance + 4 * math.sqrt(2 * chance * (1 - chance) / (D + 2)) if J < D else math.inf
    return shares, next((i for i, share in enumerate(shares) if share <= limit), len(shares))


def _leading(count: int) -> str:
    return "That one of" if count == 1 else f"The first {count} of"


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"
