"""Batches of examples in a seeded order that can be continued exactly where it stopped.

The order of an epoch follows from the seed and the epoch's number alone, so the state of a stream is two numbers,
and nothing depends on how many batches were drawn before or in which process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from deltaw.errors import ConfigError, Fault, StateError

_GROUPED_BATCHES = 50
_Item = TypeVar("_Item", covariant=True)


class Examples(Protocol[_Item]):
    """Anything with a length and items by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> _Item: ...


class Subset(Generic[_Item]):
    """Some of a data set's examples, in the order given."""

    def __init__(self, examples: Examples[_Item], indices: Sequence[int] | NDArray[np.int64]) -> None:
        self._examples, self.indices = examples, np.asarray(indices, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> _Item:
        """The example with this number within the subset."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return self._examples[int(self.indices[index])]


class BatchStream(Generic[_Item]):
    """An endless iterator over batches, epoch after epoch; the last batch of an epoch may be smaller.

    With `lengths`, the token count of each example, and `grouped`, batches hold examples of similar length: every
    stretch of 50 shuffled batches is sorted, and the batches are shuffled again. The order is then less random and
    padding far smaller. With `max_tokens` a batch ends before it has more tokens than that, and `batch_size` is the
    most examples that it may have; an example that is longer is a batch by itself.
    """

    def __init__(self, examples: Examples[_Item], batch_size: int, seed: int, *, shuffle: bool = True,
                 lengths: Sequence[int] | NDArray[np.int64] | None = None, grouped: bool = True,
                 max_tokens: int | None = None, drop_last: bool = False) -> None:
        faults = []
        if max_tokens is not None and (max_tokens < 1 or lengths is None or drop_last):
            faults.append(Fault("max_tokens", f"got {max_tokens}", "at least 1, with lengths and without drop_last"))
        if batch_size < 1:
            faults.append(Fault("batch_size", f"got {batch_size}", "at least 1"))
        if seed < 0:
            faults.append(Fault("seed", f"got {seed}", "0 or more"))
        if not len(examples) or (drop_last and len(examples) < batch_size):
            faults.append(Fault("examples", f"{len(examples)} do not fill a batch", "at least one batch",
                                "Give more data or a smaller batch_size"))
        if lengths is not None and len(lengths) != len(examples):
            faults.append(Fault("lengths", f"got {len(lengths)}", f"one for each of the {len(examples)} examples"))
        if faults:
            raise ConfigError(*faults)
        self._examples, self._batch_size, self._seed = examples, batch_size, seed
        self._shuffle, self._drop_last = shuffle, drop_last
        self._lengths = None if lengths is None else np.asarray(lengths)
        self._grouped, self._max_tokens = grouped and lengths is not None, max_tokens
        self.epoch = 0
        """Epochs completed."""
        self.position = 0
        """Batches of this epoch that have been given."""
        self._batches = self._plan(0)

    @property
    def batches_per_epoch(self) -> int:
        """The number of batches of this epoch; with `max_tokens` it differs a little between epochs."""
        return len(self._batches)

    def __iter__(self) -> Iterator[list[_Item]]:
        return self

    def __next__(self) -> list[_Item]:
        batch = [self._examples[int(i)] for i in self._batches[self.position]]
        self.position += 1
        if self.position == self.batches_per_epoch:
            self.epoch, self.position = self.epoch + 1, 0
            self._batches = self._plan(self.epoch)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream, and what the order depends on, as plain JSON values."""
        return {"epoch": self.epoch, "position": self.position} | self._identity()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place that `state_dict` gave; a stream over other data or with other options is a `StateError`."""
        faults = [Fault(f"data stream '{name}'", f"is {value}", f"{state.get(name)}, as when the state was saved",
                        "Resume with the same data and options") for name, value in self._identity().items()
                  if state.get(name) != value]
        epoch, position = state.get("epoch"), state.get("position")
        batches = self._plan(epoch) if isinstance(epoch, int) and epoch >= 0 else []
        if not (isinstance(position, int) and 0 <= position < len(batches)):
            faults.append(Fault("data stream", f"has the place epoch {epoch}, batch {position}",
                                f"a batch of the {len(batches)} of an epoch"))
        if faults:
            raise StateError(*faults)
        assert isinstance(epoch, int)
        assert isinstance(position, int)
        self.epoch, self.position, self._batches = epoch, position, batches

    def _identity(self) -> dict[str, Any]:
        return {"examples": len(self._examples), "batch_size": self._batch_size, "seed": self._seed,
                "shuffle": self._shuffle, "grouped": self._grouped, "drop_last": self._drop_last} \
            | ({} if self._max_tokens is None else {"max_tokens": self._max_tokens})

    def _plan(self, epoch: int) -> list[NDArray[np.int64]]:
        """The examples of each batch of an epoch."""
        n, size = len(self._examples), self._batch_size
        if not self._shuffle:
            return self._cut(np.arange(n))
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self._seed, epoch])))
        order = generator.permutation(n)
        if not self._grouped:
            return self._cut(order)
        assert self._lengths is not None
        stretch = size * _GROUPED_BATCHES
        for start in range(0, n, stretch):
            part = order[start:start + stretch]
            order[start:start + stretch] = part[np.argsort(self._lengths[part], kind="stable")]
        batches = self._cut(order)
        whole = len(batches) if self._max_tokens is not None else n // size  # the one that may be smaller stays last
        return [*(batches[i] for i in generator.permutation(whole)), *batches[whole:]]

    def _cut(self, order: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Consecutive runs of the order, as large as a batch may be."""
        size = self._batch_size
        if self._max_tokens is None:
            stop = len(order) // size * size if self._drop_last else len(order)
            return [order[at:min(at + size, stop)] for at in range(0, stop, size)]
        assert self._lengths is not None
        edges, tokens = [0], 0
        for at, length in enumerate(self._lengths[order].tolist()):
            if at > edges[-1] and (at - edges[-1] == size or tokens + length > self._max_tokens):
                edges.append(at)
                tokens = 0
            tokens += length
        return np.split(order, edges[1:])


def in_order(examples: Examples[_Item], batch_size: int) -> Iterator[list[_Item]]:
    """Every example once, in batches, in the order of the data; for evaluation."""
    for start in range(0, len(examples), batch_size):
        yield [examples[i] for i in range(start, min(start + batch_size, len(examples)))]


def split_valid(n: int, amount: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers of the examples for training and for validation, both sorted, drawn from n with this seed.

    `amount` below 1 is the fraction held out (at least one example); a whole number from 1 on is the count.

    >>> train, valid = split_valid(10, 0.2, seed=0)
    >>> len(train), len(valid)
    (8, 2)
    """
    count = max(1, round(n * amount)) if amount < 1 else int(amount)
    if amount <= 0 or (amount >= 1 and count != amount) or count >= n:
        raise ConfigError(Fault("valid split", f"got {amount} of {n} examples",
                                "a fraction below 1 or a whole number, with examples left to train on"))
    order = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed]))).permutation(n)
    return np.sort(order[count:]), np.sort(order[:count])
