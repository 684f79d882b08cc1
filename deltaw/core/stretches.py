"""How many tokens have logits at once in the loss. Plans ask it too, and so it needs no torch."""

from __future__ import annotations

STRETCH_VALUES = 1 << 24
"""Logits that exist at once: 64 MB of float32."""


def stretch_of(tokens: int, vocabulary: int) -> int:
    """Tokens whose logits exist at once: all stretches of a batch but the last have as many.

    >>> stretch_of(1024, 49152), stretch_of(5, 49152)
    (256, 5)
    """
    most = max(1, STRETCH_VALUES // vocabulary)
    return -(-tokens // -(-tokens // most)) if tokens else most
