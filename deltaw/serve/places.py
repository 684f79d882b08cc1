"""Places of the key-value cache: each holds one sequence at a time, and remembers its tokens until it is needed again.

A request that begins with tokens which some place has computed under the same adapter does not compute them again:
it continues in that place if it is free, and else has them copied.
"""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

from deltaw.serve.request import BASE, Blend, Sequence

WORTH_COPYING = 16
"""Shorter beginnings are computed again."""


@dataclass(slots=True)
class Place:
    """One place: what it holds, and for whom."""

    tokens: list[int] = field(default_factory=list)
    blend: Blend = BASE
    owner: Sequence | None = None
    left: int = 0
    """When its last owner left, by the count of departures."""


@dataclass(frozen=True, slots=True)
class Start:
    """Where a sequence begins: its place, and how many tokens it need not compute, copied from another place or not."""

    place: int
    reused: int = 0
    copy_from: int | None = None


class Places:
    """All places; `claim` and `leave` are the only ways in and out."""

    def __init__(self, count: int, *, remember: bool = True) -> None:
        self.all = [Place() for _ in range(count)]
        self.remember = remember
        self._departures = 0

    @property
    def free(self) -> list[int]:
        """Places that no sequence owns."""
        return [i for i, place in enumerate(self.all) if place.owner is None]

    def best(self, prompt: Tokens[int], blend: Blend) -> tuple[int, int]:
        """The place whose computed tokens have the longest beginning in common with a prompt, and its length.

        At least one token of the prompt is left to compute, for its logits.
        """
        found, longest = -1, 0
        for i, place in enumerate(self.all if self.remember else ()):
            if place.blend != blend:
                continue
            held = place.tokens if place.owner is None else place.owner.tokens(0, place.owner.computed)
            length = shared(held, prompt, len(prompt) - 1)
            if length > longest or (length == longest and found >= 0 and place.owner is None):
                found, longest = i, length
        return found, longest

    def claim(self, sequence: Sequence) -> Start | None:
        """Give a sequence a place, or None where none is free."""
        free = self.free
        if not free:
            return None
        found, length = self.best(sequence.prompt, sequence.blend)
        if length < WORTH_COPYING:
            start = Start(self._oldest(free))
        elif found in free:
            start = Start(found, length)
        else:
            start = Start(self._oldest(free), length, copy_from=found)
        place = self.all[start.place]
        place.owner, place.blend, place.tokens = sequence, sequence.blend, []
        sequence.place, sequence.computed, sequence.reused = start.place, start.reused, start.reused
        return start

    def leave(self, sequence: Sequence) -> None:
        """Take a sequence's place back; its tokens stay there to be found."""
        place = self.all[sequence.place]
        assert place.owner is sequence
        self._departures += 1
        place.tokens, place.owner, place.left = sequence.tokens(0, sequence.computed), None, self._departures
        sequence.place = -1

    def forget(self) -> None:
        """Forget what free places hold."""
        for i in self.free:
            self.all[i].tokens = []

    def _oldest(self, free: list[int]) -> int:
        """An empty place near the beginning, else the one that was left longest ago."""
        return min(free, key=lambda i: (self.all[i].left, i))


def shared(a: Tokens[int], b: Tokens[int], limit: int) -> int:
    """How many tokens two lists have in common at the beginning, at most `limit`.

    >>> shared([1, 2, 3], (1, 2, 4), 9)
    2
    """
    end = min(len(a), len(b), limit)
    if end <= 0 or a[0] != b[0]:
        return 0
    return next((i for i in range(end) if a[i] != b[i]), end)
