"""From an adapter's sites to the names of tensors, when the two may differ by one prefix that all share.

An adapter made on a body alone says `layers.0.q_proj` where the model with its head says `model.layers.0.q_proj`, and
the other way round. One prefix must explain every such name: a name that would need another one counts as absent.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable

from deltaw.core.geometry import Kind


def tensor_name(site: str, kind: Kind) -> str:
    """The name of the tensor that a site of this kind changes."""
    if kind in ("bias", "parameter"):
        return site
    if kind == "attention" and not site.endswith("out_proj"):
        return f"{site}_weight"
    return f"{site}.weight"


def with_common_prefix(wanted: Iterable[str], known: Collection[str]) -> dict[str, str | None]:
    """For each wanted name the known one: itself, or with the prefix added or taken away that fits the most names.

    None where there is none, and for all that differ where two prefixes fit equally well.
    """
    wanted = list(wanted)
    prefix = _common_prefix([name for name in wanted if name not in known], known)
    return {name: name if name in known else _changed(name, prefix, known) for name in wanted}


def _changed(name: str, prefix: tuple[str, str] | None, known: Collection[str]) -> str | None:
    if prefix is None:
        return None
    added, taken = prefix
    found = added + name if added else name.removeprefix(taken) if name.startswith(taken) else None
    return found if found in known else None


def _common_prefix(names: list[str], known: Iterable[str]) -> tuple[str, str] | None:
    """What to add to these names, or to take away from them; None if nothing fits, or two things equally."""
    ends: dict[str, list[str]] = defaultdict(list)
    for name in known:
        for end in _ends(name):
            ends[end].append(name)
    whole = set(known)
    votes: Counter[tuple[str, str]] = Counter()
    for name in names:
        votes.update((longer.removesuffix(name), "") for longer in ends[name])
        votes.update(("", name.removesuffix(end)) for end in _ends(name) if end in whole)
    best = votes.most_common(2)
    if not best or (len(best) == 2 and best[0][1] == best[1][1]):
        return None
    return best[0][0]


def _ends(name: str) -> list[str]:
    """The proper dotted ends of a name with at least two parts: a last part alone, such as `weight`, tells nothing."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(1, len(parts) - 1)]
