"""Paired timing: ours and the rival take turns in one run, and the last line printed is one JSON object.

A machine's speed drifts, so times are compared by ratio only: the two sides alternate A B A B, and each reports its
median. A GPU takes its work from a queue, so that a time there is from one empty queue to the next (`timed`).
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    """One measured comparison; `equal` says whether both sides computed the same."""

    case: str
    unit: str
    ours: float
    rival: float
    rival_name: str
    target: float
    better: str = "lower"
    limit: float | None = None
    equal: bool = True

    @property
    def ratio(self) -> float:
        """ours / rival."""
        return self.ours / self.rival if self.rival else float("nan")

    @property
    def met(self) -> bool:
        """Whether the ratio reaches the target."""
        return (self.ratio <= self.target if self.better == "lower" else self.ratio >= self.target) and self.equal


def timed(run: Callable[[], T], device: str = "cpu") -> tuple[float, T]:
    """Seconds that a call and the work it gave the device took, and what it returned."""
    finish(device)
    start = time.perf_counter()
    result = run()
    finish(device)
    return time.perf_counter() - start, result


def finish(device: str) -> None:
    """Wait until a GPU has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def alternate(ours: Callable[[], object], rival: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median seconds of each side over `repeats` turns, after one warm-up of each."""
    ours(), rival()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for side, run in zip(times, (ours, rival), strict=True):
            side.append(timed(run)[0])
    return statistics.median(times[0]), statistics.median(times[1])


def report(name: str, cases: list[Case], device: str = "cpu") -> int:
    """Print a table, then the JSON line; returns how many cases missed their target."""
    width = max(len(c.case) for c in cases)
    for c in cases:
        mark = "met" if c.met else "NOT MET"
        print(f"{c.case:{width}}  ours {c.ours:10.5g} {c.unit:7} {c.rival_name} {c.rival:10.5g}  "
              f"ratio {c.ratio:8.4f}  target {'<=' if c.better == 'lower' else '>='} {c.target:<7g} "
              f"{mark}{'' if c.equal else ' (NOT EQUAL)'}")
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
               "torch": torch.__version__, "threads": torch.get_num_threads(),
               "capability": torch.backends.cpu.get_cpu_capability()}
    if device == "cuda" or torch.cuda.is_initialized():  # a child may have been on it, and not this process
        machine |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    rows = [asdict(c) | {"ratio": c.ratio, "met": c.met} for c in cases]
    print(json.dumps({"benchmark": name, "machine": machine, "cases": rows}))
    return sum(not c.met for c in cases)


def gemm_rate(dtype: torch.dtype, device: str = "cpu") -> float:
    """Multiplications and additions a second that this device reaches in a large product."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(timed(lambda: a @ b, device)[0] for _ in range(10 if device == "cuda" else 4))
