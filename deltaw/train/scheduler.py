"""Who takes a step next, and what shares a pass: plain arithmetic on numbers of tokens, without torch.

    choose    jobs for the next round: those that were served least come first, within a budget of tokens
    fill      the micro-batches of a round into passes of at most the budget

Service is counted in tokens divided by priority (start-time fair queueing): a job of priority 2 gets twice the tokens
of a job of priority 1 where they compete, and a job that wants less than its share is served every round. A job that is
passed over for lack of room soon comes first; until then others overtake it by a budget of tokens and a step at most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class Scheduler:
    """Keeps account of the jobs of one set. Its state is a few numbers, so a resumed set makes the same choices."""

    def __init__(self, budget: int) -> None:
        """`budget` is the number of tokens that one round may take; a single step that is larger has its own round."""
        assert budget >= 1
        self.budget = budget
        self.served: dict[str, float] = {}
        """Tokens by priority that each job was given, in the order of joining."""
        self._priority: dict[str, float] = {}

    def join(self, name: str, priority: float = 1.0) -> None:
        """Take a job in; it starts level with the one that was served least, and has nothing to catch up on."""
        assert priority > 0
        self.served[name] = min(self.served.values(), default=0.0)
        self._priority[name] = priority

    def leave(self, name: str) -> None:
        """Let a job go."""
        self.served.pop(name, None)
        self._priority.pop(name, None)

    def choose(self, tokens: Mapping[str, int]) -> list[str]:
        """Jobs of the next round, out of those that can take a step, with the tokens that it has; at least one."""
        order = sorted(tokens, key=lambda name: self.served[name])  # stable: those that joined first, first
        chosen: list[str] = []
        room, waiting = self.budget, float("inf")  # what was served to the first that is passed over
        for name in order:
            ahead = self.served[name] - waiting
            if not chosen or (tokens[name] <= room and ahead <= self.budget / self._priority[name]):
                chosen.append(name)
                room -= tokens[name]
            else:
                waiting = min(waiting, self.served[name])
        for name in chosen:
            self.served[name] += tokens[name] / self._priority[name]
        return chosen

    def state_dict(self) -> dict[str, Any]:
        """The account, as JSON values."""
        return {"served": dict(self.served)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up an account for the jobs that are here."""
        self.served.update({name: float(value) for name, value in state["served"].items() if name in self.served})


def fill(tokens: Sequence[int], budget: int) -> list[list[int]]:
    """Numbers of the pieces of each pass, in their order: each joins the first pass with room for it.

    >>> fill([6, 5, 4, 12, 3], budget=10)
    [[0, 2], [1, 4], [3]]
    """
    passes: list[list[int]] = []
    room: list[int] = []
    for piece, size in enumerate(tokens):
        at = next((i for i, left in enumerate(room) if size <= left), None)
        if at is None:
            passes.append([piece])
            room.append(budget - size)
        else:
            passes[at].append(piece)
            room[at] -= size
    return passes
