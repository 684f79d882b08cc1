"""Whether kernels of bfloat16 can be made on a machine."""

from __future__ import annotations

import ctypes

import pytest

from deltaw.core import compiled
from deltaw.core.compiled import NoKernel, are_made


def a_library() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def none() -> ctypes.CDLL:
    raise NoKernel("there is no C compiler")


@pytest.mark.parametrize("is_for", [True, False])
def test_all_libraries_and_the_right_processor_are_needed(is_for: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "products_without_tiles", lambda: is_for)
    assert are_made(a_library, a_library) == is_for
    assert not are_made(a_library, none)


def test_nothing_is_compiled_for_another_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "products_without_tiles", lambda: False)
    asked: list[int] = []

    def ask() -> ctypes.CDLL:
        asked.append(1)
        return a_library()

    assert not are_made(ask)
    assert not asked
