"""Devices: this machine, as it is, and others by the figures of their makers' data sheets.

Rates are dense ones (no sparsity), in 10^12 multiplications and additions a second, with tensor cores where the format
has them; bandwidth is in 10^9 bytes a second. A data sheet's rate is never reached: a plan for a named device takes the
shares below of it, and says so.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deltaw.errors import ConfigError, Fault, near

COMPUTE_SHARE, BANDWIDTH_SHARE = 0.45, 0.75
"""Shares of a data sheet's rates that training is taken to reach; a plan with these is an estimate."""
_GB, _GIB = 10**9, 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Where a run would be: its memory, and the rates of its data sheet (none for this machine, which is measured)."""

    name: str
    kind: Literal["cpu", "gpu"]
    memory: int
    """Bytes that a process can have."""
    tflops: Mapping[str, float] | None = None
    """Multiplications and additions a second by format, in 10^12."""
    bandwidth: float = 0.0
    """Bytes a second, in 10^9."""
    source: str = ""
    """Where the figures are from."""

    @property
    def here(self) -> bool:
        """Whether it is this machine, which can be measured."""
        return self.tflops is None


def _gpu(name: str, memory_gb: float, bandwidth: float, fp32: float, bf16: float | None, fp16: float | None = None,
         *, binary: bool = True) -> Device:
    rates = {"fp32": fp32, "fp16": fp16 or bf16 or fp32} | ({"bf16": bf16} if bf16 else {})
    return Device(name=name, kind="gpu", memory=int(memory_gb * (_GIB if binary else _GB)), tflops=rates,
                  bandwidth=bandwidth, source="data sheet")


# Memory as the driver shows it (in GiB for cards), fp32 without TF32. Apple: unified memory, of which a process is
# given about three quarters; their cores have no separate rate for 16 bits.
DEVICES: Mapping[str, Device] = {d.name: d for d in (
    _gpu("h200", 141, 4800, 67, 989, binary=False), _gpu("h100", 80, 3350, 67, 989, binary=False),
    _gpu("h100-pcie", 80, 2000, 51, 756, binary=False), _gpu("b200", 180, 8000, 75, 2250, binary=False),
    _gpu("a100-80gb", 80, 2039, 19.5, 312), _gpu("a100-40gb", 40, 1555, 19.5, 312),
    _gpu("a10g", 24, 600, 31.2, 70), _gpu("a6000", 48, 768, 38.7, 154.8), _gpu("l4", 24, 300, 30.3, 121),
    _gpu("l40s", 48, 864, 91.6, 362), _gpu("t4", 16, 300, 8.1, None, 65), _gpu("v100-16gb", 16, 900, 15.7, None, 125),
    _gpu("v100-32gb", 32, 900, 15.7, None, 125), _gpu("p100", 16, 732, 9.3, None, 18.7),
    _gpu("rtx5090", 32, 1792, 104.8, 209.5), _gpu("rtx4090", 24, 1008, 82.6, 165.2),
    _gpu("rtx4080", 16, 717, 48.7, 97.5), _gpu("rtx4070", 12, 504, 29.1, 58.3),
    _gpu("rtx4060", 8, 272, 15.1, 30.2), _gpu("rtx3090", 24, 936, 35.6, 71.2), _gpu("rtx3060", 12, 360, 12.7, 25.5),
    _gpu("mi300x", 192, 5300, 163.4, 1307, binary=False), _gpu("mi250x", 128, 3277, 47.9, 383, binary=False),
    _gpu("m1", 12, 68, 2.6, 2.6), _gpu("m2", 18, 100, 3.6, 3.6), _gpu("m3", 18, 100, 4.1, 4.1),
    _gpu("m4", 24, 120, 4.4, 4.4), _gpu("m2-ultra", 144, 800, 27.2, 27.2), _gpu("m3-max", 96, 400, 14.2, 14.2),
    _gpu("m4-max", 96, 546, 18.4, 18.4),
)}
_ALSO = {"a100": "a100-80gb", "v100": "v100-32gb", "h100-sxm": "h100", "4090": "rtx4090", "3090": "rtx3090"}
HERE = ("auto", "cpu", "cuda", "mps")


def find_device(name: str, memory: int | None = None) -> Device:
    """The device of this name, with `memory` bytes where given; `ConfigError` with near names for an unknown one."""
    key = name.strip().lower().replace("_", "-").replace(" ", "-")
    if key.partition(":")[0] in HERE:
        found = this_machine(key)
    else:
        key = _ALSO.get(key, key)
        if key not in DEVICES and key.replace("-", "") in DEVICES:
            key = key.replace("-", "")
        if key not in DEVICES:
            known = [*HERE, *DEVICES]
            raise ConfigError(Fault("device", f"got {name!r}", "one of " + ", ".join(known), near(key, known) or
                                    "For one that is not listed, name a similar one and its --memory"))
        found = DEVICES[key]
    if memory is None:
        return found
    return Device(name=found.name, kind=found.kind, memory=memory, tflops=found.tflops, bandwidth=found.bandwidth,
                  source=found.source)


def this_machine(kind: str = "auto") -> Device:
    """This machine: its GPU where torch would use one, else its processor with the memory that can be had now."""
    import torch

    if kind != "cpu" and torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        found = torch.cuda.get_device_name()
        known = next((d for n, d in DEVICES.items() if n.replace("-", "") in found.lower().replace(" ", "")), None)
        return Device(name=f"this machine's {found}", kind="gpu", memory=free,
                      tflops=known.tflops if known else {"fp32": 20.0, "bf16": 100.0, "fp16": 100.0},
                      bandwidth=known.bandwidth if known else 500.0, source="data sheet" if known else "a guess")
    return Device(name="this machine", kind="cpu", memory=available_memory())


def available_memory() -> int:
    """Bytes that this process could hold, those that it holds included; within a container's limit."""
    found = [size for size in (_meminfo(), _cgroup()) if size]
    return min(found) if found else _physical()


def resident_memory() -> int:
    """Bytes that this process holds now; 0 where that is not known."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _meminfo() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
    free = sizes.get("MemAvailable", 0)
    return free + sizes.get("SwapFree", 0) + resident_memory() if free else 0


def _cgroup() -> int:
    """What the container's limit leaves, counting what this process holds; 0 without a limit."""
    for limit, used in (("memory.max", "memory.current"),
                        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        try:
            most = Path("/sys/fs/cgroup", limit).read_text(encoding="ascii").strip()
            now = int(Path("/sys/fs/cgroup", used).read_text(encoding="ascii"))
            if most == "max" or int(most) > 1 << 60:
                return 0
            # What is used holds file caches that give way; only what others hold for sure is not counted here.
            return max(int(most) - now + _file_cache() + resident_memory(), 0)
        except (OSError, ValueError):
            continue
    return 0


def _file_cache() -> int:
    try:
        lines = Path("/sys/fs/cgroup/memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("file ")), 0)


def _physical() -> int:
    if sys.platform == "win32":
        return 16 * _GIB
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
