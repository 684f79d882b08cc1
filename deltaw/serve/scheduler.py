"""Who runs next. Requests join and leave at every step; all that run get a token at every step.

Places are given out fairly between adapters: the next place goes to the adapter that has been given least so far,
counted in tokens (start-time fair queuing, Goyal et al. 1996: an adapter that was idle starts from the least of those
that wait, and cannot save up). Among the requests of one adapter the first comes first. So every request that fits
runs in the end, whatever others ask for.

Long prompts are computed in parts of at most `prefill_tokens` a step, so that those who write wait little.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from deltaw.serve.places import WORTH_COPYING, Places, Start, shared
from deltaw.serve.request import Blend, Sequence


class QueueFull(Exception):
    """There are as many waiting requests as are allowed."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one sequence to compute in a step: from `start` to before `end`."""

    sequence: Sequence
    start: int
    end: int

    @property
    def completes(self) -> bool:
        """Whether the logits of its last token choose the next one."""
        return self.end == self.sequence.length


@dataclass(slots=True)
class Step:
    """What to compute: `starts` first, which may copy cached tokens, then all `chunks` in one forward."""

    chunks: list[Chunk] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)


class Scheduler:
    """Holds what waits and what runs; knows nothing of models."""

    def __init__(self, *, places: int, prefill_tokens: int = 512, max_waiting: int = 1024,
                 remember: bool = True) -> None:
        self.places = Places(places, remember=remember)
        self.prefill_tokens, self.max_waiting = prefill_tokens, max_waiting
        self.running: list[Sequence] = []
        self._waiting: OrderedDict[Blend, deque[Sequence]] = OrderedDict()
        self._given: dict[Blend, float] = {}
        self._least = 0.0

    # -- what there is -----------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return sum(map(len, self._waiting.values()))

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.running and not self._waiting

    def sequences(self) -> Iterator[Sequence]:
        """All that run, then all that wait."""
        yield from self.running
        for queue in self._waiting.values():
            yield from queue

    # -- in and out --------------------------------------------------------------------------------------------------

    def add(self, *sequences: Sequence) -> None:
        """Let sequences wait, all of them or none: `QueueFull` where they would be too many.

        Those that free places will take do not count.
        """
        if self.waiting + len(sequences) > self.max_waiting + len(self.places.free):
            raise QueueFull
        for sequence in sequences:
            if sequence.blend not in self._waiting:
                self._waiting[sequence.blend] = deque()
                self._given[sequence.blend] = max(self._given.get(sequence.blend, 0.0), self._least)
            self._waiting[sequence.blend].append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is; its place is free at once."""
        if sequence.place >= 0:
            self.running.remove(sequence)
            self.places.leave(sequence)
        else:
            queue = self._waiting.get(sequence.blend)
            if queue is not None and sequence in queue:
                queue.remove(sequence)
                self._drop_empty(sequence.blend)

    # -- steps -------------------------------------------------------------------------------------------------------

    def line(self, count: int) -> list[Blend]:
        """The adapters of those that wait, at most so many, in the order in which places are given to them."""
        return sorted(self._waiting, key=lambda blend: self._given[blend])[:count]

    def plan(self, admits: Callable[[Blend], bool] = lambda blend: True,
             is_read: Callable[[Blend], bool] = lambda blend: True) -> Step:
        """The next step; `admits` says whether an adapter has room in memory beside those that run.

        Others pass one that has, for as long as it is being read, and nobody passes one that waits for room, or it
        would starve.
        """
        step = Step()
        while self._waiting and self.places.free:
            chosen = self._next(admits, is_read)
            if chosen is None:
                break
            start = self.places.claim(chosen)
            if start is None:
                break
            self._take(chosen)
            step.starts.append(start)
            self.running.append(chosen)
        budget = self.prefill_tokens
        for sequence in self.running:
            if sequence.pending == 1:
                step.chunks.append(Chunk(sequence, sequence.computed, sequence.length))
            elif budget > 0:
                end = min(sequence.length, sequence.computed + budget)
                budget -= end - sequence.computed
                step.chunks.append(Chunk(sequence, sequence.computed, end))
        return step

    def done(self, step: Step) -> None:
        """Note that a step was computed."""
        for chunk in step.chunks:
            chunk.sequence.computed = chunk.end

    def _next(self, admits: Callable[[Blend], bool], is_read: Callable[[Blend], bool]) -> Sequence | None:
        """The first request of the adapter that was given least, of those that can run now."""
        for blend in self.line(len(self._waiting)):
            first = self._waiting[blend][0]
            if self._awaits_beginning(first):
                continue
            if not admits(blend):
                return None
            if is_read(blend):
                return first
        return None

    def _awaits_beginning(self, sequence: Sequence) -> bool:
        """Whether a running sequence is about to compute a beginning that this one could copy."""
        here = self.places.best(sequence.prompt, sequence.blend)[1]
        return any(other.blend == sequence.blend and other.computed < len(other.prompt) and
                   shared(other.prompt, sequence.prompt, len(sequence.prompt) - 1) >= here + WORTH_COPYING
                   for other in self.running)

    def _take(self, sequence: Sequence) -> None:
        self._waiting[sequence.blend].popleft()
        self._least = max(self._least, self._given[sequence.blend])
        self._given[sequence.blend] += sequence.room
        self._drop_empty(sequence.blend)

    def _drop_empty(self, blend: Blend) -> None:
        if not self._waiting[blend]:
            del self._waiting[blend]
        # What an idle adapter was given counts only as long as it is ahead of those that wait.
        if len(self._given) > 64 + 4 * len(self._waiting):
            self._given = {b: given for b, given in self._given.items() if b in self._waiting or given > self._least}
