"""The engine: one thread that runs step after step, and takes what others ask of it between two steps.

    submit, cancel, call     from any thread; nothing of the engine's state is touched outside its own thread
    a step                   plan (scheduler), enter adapters (pool → banks), forward (runner), choose (sampler), tell
    beside the steps         adapters of those that wait are read in a thread of their own (ahead)

What fails for one adapter ends the requests that use it; what fails in a forward ends those that ran; what fails where
nothing was foreseen ends all that is open. The engine goes on. Should its thread end all the same, whatever is asked of
it fails at once with `EngineStopped`.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from deltaw.errors import DeltawError
from deltaw.serve.ahead import ReadAhead
from deltaw.serve.banks import Banks, Factors, blended
from deltaw.serve.fit import Fitted
from deltaw.serve.merging import AutoMerge
from deltaw.serve.pool import Pool
from deltaw.serve.request import Blend, EngineStopped, Event, FinishReason, OnEvent, SamplingParams, Sequence
from deltaw.serve.runner import Runner
from deltaw.serve.sampling import Sampler
from deltaw.serve.scheduler import Chunk, Scheduler, Step
from deltaw.serve.text import TextStream

R = TypeVar("R")
IDLE_S = 0.5
"""Seconds after which an engine with nothing to do looks around again."""


@dataclass(slots=True)
class Counters:
    """What was done since the start."""

    steps: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    written_tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    step_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Asked(Generic[R]):
    """A function for the engine's thread, and who waits for its result."""

    function: Callable[[], R]
    result: Future[R]

    def do(self) -> None:
        """Run it, unless nobody waits any more."""
        if not self.result.set_running_or_notify_cancel():
            return
        try:
            self.result.set_result(self.function())
        except BaseException as error:
            self.result.set_exception(error)

    def refuse(self) -> None:
        """Say that it will not be run."""
        if self.result.set_running_or_notify_cancel():
            self.result.set_exception(EngineStopped("The engine has stopped."))


class Engine:
    """Serves sequences over one model; `start` it, `submit` to it, `stop` it."""

    def __init__(self, runner: Runner, scheduler: Scheduler, pool: Pool[Fitted], banks: Banks, *,
                 decode: Callable[[Iterable[int]], str], ends: Iterable[int], sampler: Sampler | None = None,
                 merge: AutoMerge | None = None) -> None:
        self.scheduler, self.pool, self.counters = scheduler, pool, Counters()
        self._runner, self._banks, self._decode, self._ends = runner, banks, decode, frozenset(ends)
        self._sampler, self._merge = sampler or Sampler(), merge
        self.ahead = ReadAhead(pool, self.call, self._refuse)
        self._asked: queue.SimpleQueue[Asked[Any] | None] = queue.SimpleQueue()
        self._gate = threading.Lock()
        self._closed = False
        self._texts: dict[int, TextStream] = {}
        self._numbers = itertools.count(1)
        self._thread = threading.Thread(target=self._loop, name="deltaw-engine", daemon=True)
        self._stopping = False

    # -- from any thread ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to run."""
        self._thread.start()

    def stop(self) -> None:
        """End after the present step; what runs is cancelled."""
        self._asked.put(None)
        self._thread.join()
        self.ahead.close()

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    def submit(self, prompt: Iterable[int], mix: Mapping[str, float], params: SamplingParams,
               on_events: Iterable[OnEvent], *, deadline: float = float("inf"),
               continues: bool = False) -> Future[list[Sequence]]:
        """Let one answer for each of `on_events` be written, with these adapters and weights; empty is the base.

        `deadline` is in seconds of `time.monotonic`. Where an answer's text `continues` the prompt's, its first space
        is part of it. The result fails with `QueueFull`, with `StateError` for an unknown adapter, and with
        `EngineStopped`. Several answers to one request with a seed get seeds that follow each other.
        """
        tokens = tuple(prompt)

        def add() -> list[Sequence]:
            blend = tuple(sorted((self.pool.resolve(name), weight) for name, weight in mix.items() if weight))
            sequences = [Sequence(next(self._numbers), tokens, blend, _seeded(params, i), on_event, deadline)
                         for i, on_event in enumerate(on_events)]
            self.scheduler.add(*sequences)
            for sequence in sequences:
                self.pool.pin(blend)
                self._texts[sequence.number] = TextStream(self._decode, params.stop, tokens if continues else ())
            return sequences

        return self.call(add)

    def cancel(self, sequences: Iterable[Sequence]) -> None:
        """End sequences; their places are free before the next step."""
        def end() -> None:
            for sequence in sequences:
                self._end(sequence, "cancelled")

        self.call(end)

    def call(self, function: Callable[[], R]) -> Future[R]:
        """Run a function in the engine's thread, between two steps; a result that is cancelled before is not made."""
        asked: Asked[R] = Asked(function, Future())
        with self._gate:
            if not self._closed:
                self._asked.put(asked)
                return asked.result
        asked.refuse()
        return asked.result

    # -- in the engine's thread --------------------------------------------------------------------------------------

    def _loop(self) -> None:
        busy = False
        try:
            while not self._stopping:
                try:
                    self._listen(wait=not busy)
                    busy = False
                    busy = not self.scheduler.idle and self.step()
                except Exception as error:  # nothing that was foreseen: all that is open is told, and the next can come
                    traceback.print_exc()
                    for sequence in list(self.scheduler.sequences()):
                        self._fail(sequence, error)
            for sequence in list(self.scheduler.sequences()):
                self._end(sequence, "cancelled")
        finally:
            self._close()

    def _close(self) -> None:
        """Refuse what is asked from now on, and tell whoever still listens: nobody is left to do it."""
        with self._gate:
            self._closed = True
        for sequence in self.scheduler.sequences():
            with suppress(Exception):
                sequence.on_event(Event(finish="error", error="The engine has stopped."))
        while not self._asked.empty():
            asked = self._asked.get()
            if asked is not None:
                asked.refuse()

    def _listen(self, *, wait: bool) -> None:
        """Do what was asked; `wait` for something where there is nothing else to do."""
        while True:
            try:
                asked = self._asked.get(block=wait, timeout=IDLE_S if wait else None)
            except queue.Empty:
                return
            wait = False
            if asked is None:
                self._stopping = True
                return
            asked.do()

    def step(self) -> bool:
        """One step: everybody who runs gets a token, or a part of their prompt computed. False where nobody can run."""
        began = time.monotonic()
        for sequence in [s for s in self.scheduler.sequences() if s.deadline < began]:
            self._end(sequence, "timeout")
        self.ahead.look((s.blend for s in self.scheduler.running), self.scheduler.line(len(self.scheduler.places.all)))
        step = self.scheduler.plan(self.ahead.has_room, self.ahead.is_read)
        for start in step.starts:
            self._runner.begin(start)
        if not step.chunks:
            return False
        self._enter(step)
        if step.chunks:
            self._compute(step, began)
        return True

    def _compute(self, step: Step, began: float) -> None:
        """The forward of a step, and what it gives to whom."""
        try:
            complete, logits = self._runner.run(step.chunks)
            chosen = self._sampler.choose(logits, [chunk.sequence for chunk in complete])
        except Exception as error:  # whatever a model raises: those who ran are told, and the others go on
            traceback.print_exc()
            for chunk in step.chunks:
                self._fail(chunk.sequence, error)
            return
        self.scheduler.done(step)
        self._count(step, complete, time.monotonic() - began)
        for chunk, (token, logprob) in zip(complete, chosen, strict=True):
            self._tell(chunk.sequence, token, (logprob,) if logprob is not None else ())

    def _enter(self, step: Step) -> None:
        """Have the factors of everybody who runs in place; an adapter that cannot be ends its requests."""
        running = {sequence.blend for sequence in self.scheduler.running}
        if self._merge is not None:
            self._banks.merged = self._merge.choose(self.scheduler.sequences(), self.factors)
        for blend in dict.fromkeys(chunk.sequence.blend for chunk in step.chunks):
            try:
                if blend != self._banks.merged and blend not in self._banks.where:
                    self._banks.enter(blend, self.factors(blend), running)
            except Exception as error:  # no memory for a larger stack, for one
                traceback.print_exc()
                for chunk in [c for c in step.chunks if c.sequence.blend == blend]:
                    step.chunks.remove(chunk)
                    self._fail(chunk.sequence, error)

    def _refuse(self, number: int, error: Exception) -> None:
        """End the requests for an adapter that cannot be read."""
        if not isinstance(error, (DeltawError, OSError)):
            traceback.print_exception(error)
        for sequence in [s for s in self.scheduler.sequences() if any(n == number for n, _ in s.blend)]:
            self._fail(sequence, error)

    def factors(self, blend: Blend) -> Factors:
        """The factors of a blend; its adapters are in memory, or read now."""
        parts = [(self.pool.get(number, self.ahead.needed).factors, weight) for number, weight in blend]
        return parts[0][0] if len(parts) == 1 and parts[0][1] == 1 else blended(parts)

    def _tell(self, sequence: Sequence, token: int, logprobs: tuple[object, ...]) -> None:
        """Note a sequence's next token, and end it where it ends."""
        text = self._texts[sequence.number]
        ended = token in self._ends and not sequence.params.ignore_eos
        sequence.written.append(token)
        piece = "" if ended else text.push(token)
        finish: FinishReason | None = "stop" if ended or text.stopped else None
        if finish is None and len(sequence.written) >= sequence.params.max_tokens:
            finish = "length"
        if finish is not None:
            piece += text.flush()
        reused = sequence.reused if len(sequence.written) == 1 else 0
        event = Event(piece, (token,), logprobs, finish, reused=reused)  # type: ignore[arg-type]
        if finish is None:
            self._report(sequence, event)
        else:
            self._end(sequence, finish, event)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        self._end(sequence, "error", Event(finish="error", error=str(error) or type(error).__name__,
                                           refused=isinstance(error, DeltawError)))

    def _end(self, sequence: Sequence, finish: FinishReason, event: Event | None = None) -> None:
        """Free everything of a sequence, then say so."""
        if self._texts.pop(sequence.number, None) is None:
            return
        self.scheduler.remove(sequence)
        self._sampler.forget(sequence)
        self.pool.unpin(sequence.blend)
        self.counters.finished[finish] = self.counters.finished.get(finish, 0) + 1
        self._report(sequence, event or Event(finish=finish))

    def _report(self, sequence: Sequence, event: Event) -> None:
        """Tell whoever listens; one that fails, such as a loop that was closed, ends its own sequence alone."""
        try:
            sequence.on_event(event)
        except Exception:
            traceback.print_exc()
            self._end(sequence, "cancelled")

    def _count(self, step: Step, complete: list[Chunk], seconds: float) -> None:
        counters = self.counters
        counters.steps += 1
        counters.step_seconds += seconds
        counters.written_tokens += len(complete)
        counters.prompt_tokens += sum(min(c.end, len(c.sequence.prompt)) - c.start for c in step.chunks
                                      if c.start < len(c.sequence.prompt))
        counters.reused_tokens += sum(start.reused for start in step.starts)


def _seeded(params: SamplingParams, index: int) -> SamplingParams:
    from dataclasses import replace

    return params if params.seed is None or not index else replace(params, seed=params.seed + index)
