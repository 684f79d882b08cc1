"""The next batch is made while the step on this one runs, in one thread beside it.

What a checkpoint writes down is the place after the last batch that was *used*: the one that lies ready is made again
after resuming, and is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from deltaw.train.state import Batch, Batches


class Prefetched:
    """`Batches` that are one ahead of those that were asked for; use it in a `with`, which ends its thread."""

    def __init__(self, batches: Batches) -> None:
        self._batches, self._place = batches, batches.state_dict()
        self._maker = ThreadPoolExecutor(1, thread_name_prefix="deltaw-batches")
        self._ready: Future[tuple[Batch, dict[str, Any]]] | None = None

    def __enter__(self) -> Prefetched:
        return self

    def __exit__(self, *_: object) -> None:
        self._maker.shutdown(cancel_futures=True)

    def __next__(self) -> Batch:
        """The batch that was made meanwhile; what failed while making it is raised here."""
        ready = self._ready if self._ready is not None else self._maker.submit(self._make)
        self._ready = None
        batch, self._place = ready.result()
        self._ready = self._maker.submit(self._make)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The place after the batch that was given last."""
        return dict(self._place)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a place that `state_dict` gave; what lay ready is dropped."""
        if self._ready is not None:
            self._ready.exception()  # waited for: it moves the stream
            self._ready = None
        self._batches.load_state_dict(state)
        self._place = self._batches.state_dict()

    def _make(self) -> tuple[Batch, dict[str, Any]]:
        batch = next(self._batches)
        return batch, self._batches.state_dict()
