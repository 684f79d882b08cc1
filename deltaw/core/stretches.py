"""How much exists at once: tokens with logits in the loss, rows of a packed weight. Plans ask too: no torch here."""

from __future__ import annotations

import math

STRETCH_VALUES = 1 << 24
"""Logits that exist at once: 64 MB of float32."""
STRIP = 1 << 22
"""Most numbers in a strip of a packed weight: 16 MB in float32."""
GPU_STRIP = 1 << 25
"""The same of a table in 8 bits on a GPU, where each strip is a few launches."""
_VECTOR = 32


def stretch_of(tokens: int, vocabulary: int) -> int:
    """Tokens whose logits exist at once: all stretches of a batch but the last have as many.

    >>> stretch_of(1024, 49152), stretch_of(5, 49152)
    (256, 5)
    """
    most = max(1, STRETCH_VALUES // vocabulary)
    return -(-tokens // -(-tokens // most)) if tokens else most


def rows_of_a_strip(count: int, columns: int, *, on_gpu: bool = False) -> int:
    """Rows in each strip but the last of a weight (count, columns): strips of about the same size.

    They are whole vectors, as kernels take them.

    >>> rows_of_a_strip(151_936, 896)
    4608
    """
    size = math.ceil(count / math.ceil(count * columns / (GPU_STRIP if on_gpu else STRIP)))
    return size if size < _VECTOR else math.ceil(size / _VECTOR) * _VECTOR
