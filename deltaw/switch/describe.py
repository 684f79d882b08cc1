"""The table of what an adapter changes, for people: sites of like name, shape and rank in one line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from deltaw.inject import Target


def describe(targets: Mapping[str, Sequence[Target]], active: Mapping[str, float]) -> str:
    """One block for each adapter: its sites with their kind, weight, rank and count, and the sum.

    `model.layers.*.q_proj` stands for the sites that differ in their layer's number only.
    """
    return "\n".join(_block(name, found, active.get(name)) for name, found in targets.items()) or "no adapter"


def _block(name: str, targets: Sequence[Target], weight: float | None) -> str:
    groups: dict[tuple[str, str, tuple[int, ...], int], int] = {}
    for target in targets:
        shape = target.site.geometry.shape
        key = (re.sub(r"\.\d+(?=\.)", ".*", target.site.name), target.site.kind, shape, target.rank)
        groups[key] = groups.get(key, 0) + 1
    count = sum(target.parameters for target in targets)
    state = "off" if weight is None else "on" if weight == 1 else f"on, weight {weight:g}"
    rows = [("sites", "kind", "weight", "rank", "")]
    rows += [(pattern, kind, "x".join(map(str, shape)), str(rank or "full"), f"x {times}")
             for (pattern, kind, shape, rank), times in groups.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([f"{name} ({state}): {len(targets)} sites, {count:,} values", *(f"  {line}" for line in lines)])
