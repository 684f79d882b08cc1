"""The kernel's library: compiled by the machine's own C compiler for its own processor, and kept between runs."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path

from deltaw.bases.kept import keep
from deltaw.core.home import home

SOURCES = ("step.c", "job.h", "layer.h", "product.h", "rows.h")
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fopenmp-simd", "-fno-math-errno", "-Wno-psabi", "-shared", "-fPIC")
TIMEOUT_S = 120


class NoKernel(Exception):
    """Why there is no kernel here, or none for a model."""


@cache
def library() -> ctypes.CDLL:
    """The compiled kernel, made at the first call on a machine; raises NoKernel where that is not possible."""
    compiler = shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise NoKernel("there is no C compiler")
    here = Path(__file__).parent
    told = "".join((here / name).read_text(encoding="utf-8") for name in SOURCES)
    told += " ".join((compiler, *FLAGS, _processor()))
    folder = home() / "kernels" / hashlib.sha256(told.encode()).hexdigest()[:16]
    try:
        if not (folder / "step.so").exists():
            keep(folder, lambda partial: _compile(compiler, here, partial))
        return ctypes.CDLL(str(folder / "step.so"))
    except (OSError, subprocess.SubprocessError) as error:
        raise NoKernel(f"{Path(compiler).name} made none ({type(error).__name__})") from error


def _compile(compiler: str, source: Path, folder: Path) -> None:
    folder.mkdir()
    command = [compiler, *FLAGS, str(source / "step.c"), "-o", str(folder / "step.so"), "-lm", "-lpthread"]
    subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT_S)


def _processor() -> str:
    """What `-march=native` depends on: a home folder may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return "".join(next((line for line in lines if line.startswith(key)), "") for key in ("model name", "flags"))
