"""The formats that a base can be packed into, and which go together. Configs ask it, and so it needs no torch."""

from __future__ import annotations

from typing import Literal

from deltaw.errors import Fault

Format = Literal["nf4", "fp4", "int8"]
"""Of linear layers."""
Tables = Literal["none", "int8"]
"""Of the vocabulary's tables."""


def tables_alone(where: str, quantize: str | None, tables: str) -> Fault | None:
    """What to say of packed tables beside linear layers that are not; None where nothing is to be said."""
    if tables != "int8" or quantize not in (None, "none"):
        return None
    return Fault(where, f"got {tables!r} without quantize", "quantize too: nf4, fp4 or int8",
                 "Pack the linear layers as well, which weigh more; or leave quantize_tables out")
