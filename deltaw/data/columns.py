"""What tokenising a data set leaves: columns of numbers over its examples, and counts of what became of the rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeStats:
    """What became of the rows."""

    rows: int
    """Rows that were read."""
    examples: int
    """Examples that were made; a long text makes several."""
    dropped_no_supervision: int
    """Examples left out because truncation took every token that would be learnt."""
    truncated: int
    """Examples, of those kept, that lost tokens to `max_length`."""
    supervised_tokens: int
    """Tokens that the loss counts; for a classifier, the examples."""
    tokens: int
    """All tokens kept."""
    longest: int
    """Tokens of the longest example."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Everything about the examples but their rows."""

    ids: NDArray[np.int32]
    """The tokens of all examples, one example after the other."""
    marks: NDArray[np.uint8]
    """A mark for each token, as `Encoded.marks`."""
    ends: NDArray[np.int64]
    """For each example, where the next one begins."""
    rows: NDArray[np.int64]
    """For each example, the number of its row."""
    classes: NDArray[np.int64] | None = None
    """For each row, the number of its class, if the data is labelled."""
