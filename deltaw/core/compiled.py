"""Kernels in C: compiled by the machine's own compiler for its own processor, and kept between runs."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch

from deltaw.core.home import home
from deltaw.core.kept import keep

FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fno-math-errno", "-shared", "-fPIC")
TIMEOUT_S = 120
NATIVE = Path(__file__).parent / "native"
"""The C files of training."""


class NoKernel(Exception):
    """Why there is no kernel here, or none for a model."""


def compiled(main: Path, flags: Sequence[str] = ()) -> ctypes.CDLL:
    """The library made of a C file and the headers beside it, compiled at its first call on a machine.

    Raises NoKernel where that is not possible.
    """
    compiler = shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise NoKernel("there is no C compiler")
    command = [compiler, *FLAGS, *flags]
    told = "".join(file.read_text(encoding="utf-8") for file in (main, *sorted(main.parent.glob("*.h"))))
    told += " ".join((*command, _processor()))
    folder = home() / "kernels" / hashlib.sha256(told.encode()).hexdigest()[:16]
    library = folder / f"{main.stem}.so"
    try:
        if not library.exists():
            keep(folder, lambda partial: _compile(command, main, partial))
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError) as error:
        raise NoKernel(f"{Path(compiler).name} made none ({type(error).__name__})") from error


def passes(main: Path, job: type[ctypes.Structure]) -> ctypes.CDLL:
    """The library of a C file with `forward` and `backward`: each takes a job, and says if there was memory for it."""
    library = compiled(main, ("-fopenmp",))
    for function in (library.forward, library.backward):
        function.argtypes, function.restype = [ctypes.POINTER(job)], ctypes.c_bool
    return library


def are_made(*libraries: Callable[[], ctypes.CDLL]) -> bool:
    """Whether this processor is one that kernels of bfloat16 are for, and these libraries can be made here."""
    try:
        return products_without_tiles() and all(library() for library in libraries)
    except NoKernel:
        return False


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def products_without_tiles() -> bool:
    """Whether this processor multiplies bfloat16 natively and has no tile registers for it."""
    return _without_tiles()


@cache
def _without_tiles() -> bool:
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16")) and not found.get("amx_bf16")


def _compile(command: list[str], main: Path, folder: Path) -> None:
    folder.mkdir()
    subprocess.run([*command, str(main), "-o", str(folder / f"{main.stem}.so"), "-lm", "-lpthread"], check=True,
                   capture_output=True, timeout=TIMEOUT_S)


def _processor() -> str:
    """What `-march=native` depends on: a home folder may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return "".join(next((line for line in lines if line.startswith(key)), "") for key in ("model name", "flags"))
