"""The library of the kernel of a serving step."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from deltaw.core.compiled import compiled


@cache
def library() -> ctypes.CDLL:
    """The compiled kernel, made at the first call on a machine; raises NoKernel where that is not possible."""
    return compiled(Path(__file__).with_name("step.c"), ("-fopenmp-simd", "-Wno-psabi"))
