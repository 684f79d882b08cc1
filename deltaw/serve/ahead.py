"""Adapters are read ahead of the engine, in a thread of its own: those that run go on while one is read from disk.

What the next in line need is read as soon as there is room for it beside those that run and those before them in line,
so that an adapter is there when a place is free. The thread reads and checks, one adapter after another, and each once
however many wait for it; whether there is room, what is kept and who may run is decided in the engine's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any, Generic

from deltaw.serve.pool import Entry, Pool, T
from deltaw.serve.request import Blend, EngineStopped


class ReadAhead(Generic[T]):
    """The reader of a pool. `call` runs a function in the engine's thread; `on_fault` is told what cannot be read."""

    def __init__(self, pool: Pool[T], call: Callable[[Callable[[], None]], object],
                 on_fault: Callable[[int, Exception], None]) -> None:
        self._pool, self._call, self._on_fault = pool, call, on_fault
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="deltaw-reader")
        self._asked: set[int] = set()
        self._has_room: set[Blend] = set()
        self.needed: frozenset[int] = frozenset()
        """Adapters of those that run, and of those that can run next: they stay in memory."""

    def look(self, running: Iterable[Blend], line: Iterable[Blend]) -> None:
        """Have read what those next in line need, as far as there is room: nobody passes one that waits for memory."""
        ahead = list(running)
        for blend in line:
            if not self._pool.fits(blend, ahead):
                break
            ahead.append(blend)
        self._has_room = set(ahead)
        numbers = dict.fromkeys(number for blend in ahead for number, _ in blend)
        self.needed = frozenset(numbers)
        for number in numbers:
            if self._pool.numbered(number).loaded is None and number not in self._asked:
                self._ask(self._pool.numbered(number))

    def has_room(self, blend: Blend) -> bool:
        """Whether a blend has room beside those that run, and those that were before it in line."""
        return blend in self._has_room

    def is_read(self, blend: Blend) -> bool:
        """Whether all adapters of a blend are in memory."""
        return all(self._pool.numbered(number).loaded is not None for number, _ in blend)

    def read(self, entry: Entry[T]) -> T:
        """Read an entry now, in turn, and wait for it; from any thread but the engine's. Raises as `Pool.read`."""
        try:
            reading = self._thread.submit(self._pool.read, entry)
        except RuntimeError as error:  # no more is taken after `close`
            raise EngineStopped("The engine has stopped.") from error
        try:
            return reading.result()
        except CancelledError as error:
            raise EngineStopped("The engine has stopped.") from error

    def close(self) -> None:
        """End after the adapter that is being read."""
        self._thread.shutdown(cancel_futures=True)

    def _ask(self, entry: Entry[T]) -> None:
        self._asked.add(entry.number)
        reading = self._thread.submit(self._pool.read, entry)
        reading.add_done_callback(lambda done: self._call(lambda: self._take(entry, done)))

    def _take(self, entry: Entry[T], done: Future[Any]) -> None:
        """Keep what was read, or tell that it could not be."""
        self._asked.discard(entry.number)
        try:
            self._pool.hold(entry, done.result(), self.needed)
        except Exception as error:  # a file can be damaged in any way
            self._on_fault(entry.number, error)
