"""How fast this machine is: products by shape, attention, memory, and the start of an operation. Measured once, kept.

The file lies in `DELTAW_HOME`/plan; its name holds processor, threads, torch's version and number format, so that
another machine or another number of threads is measured anew. Each figure is the median of several runs.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from deltaw.bases.packed_attention import causal_attention
from deltaw.core.home import home
from deltaw.core.packed import Workspace
from deltaw.plan.calibrate_kernels import as_nf4, kernel_rates
from deltaw.store.atomic import replace_folder

NARROW = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Smallest dimension of the products that are measured."""
SIZES = (1 << 12, 1 << 16, 1 << 20, 1 << 23, 1 << 25)
"""Values of the tensors whose addition is measured."""
STATES = (1 << 10, 1 << 14, 1 << 18, 1 << 22)
"""Values of the tensors that an 8-bit AdamW is measured on."""
_WIDE = 768
_MASK = 1 << 20
"""Values of a dropout's mask."""
_LEAST_S, _MOST_S = 0.02, 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """A machine's rates for one number format."""

    narrow_output: Mapping[int, float]
    """Multiplications and additions a second of a product with this many outputs (as x Aᵀ has)."""
    narrow_inner: Mapping[int, float]
    """The same with this many summands (as H Bᵀ has)."""
    attention: float
    """Multiplications and additions a second of fused attention."""
    bytes: Mapping[int, float]
    """Bytes a second that an addition moves, by the number of its values."""
    batched: float = 0.0
    """Multiplications and additions a second of the products of heads' small matrices, strided as heads are."""
    start: float
    """Seconds that an operation takes at least, its part in the graph and the backward pass included."""
    drawn: float = 0.0
    """Random values a second."""
    unpack: float = 0.0
    """Numbers of a 4-bit weight that are unpacked a second, beside what a product takes; 0 where bitsandbytes is not
    installed."""
    adamw8bit: Mapping[int, float] = field(default_factory=dict)
    """Numbers a second that an 8-bit AdamW updates, by the numbers of a tensor; empty without bitsandbytes."""
    frozen: Mapping[int, float] = field(default_factory=dict)
    """Multiplications and additions a second of a kernel's products with a frozen weight, by tokens; empty where there
    are no kernels (`deltaw.core.native_low_rank`)."""
    narrow: Mapping[int, float] = field(default_factory=dict)
    """The same of the products of a low-rank change among them, by rank."""
    passes: float = 0.0
    """Bytes a second that kernels read and write that multiply nothing (`deltaw.bases.native_rows`)."""
    seconds: float = 0.0
    """What measuring took."""

    @property
    def has_kernels(self) -> bool:
        """Whether steps here run on kernels in C."""
        return bool(self.frozen)


def rates_file(dtype: torch.dtype, threads: int) -> Path:
    """Where the rates of this machine are kept."""
    measured = "unpack in panels|adamw8bit|kernels, masks and heads"
    facts = f"{_processor()}|{os.cpu_count()}|{threads}|{torch.__version__}|{dtype}|{measured}"
    return home() / "plan" / f"rates-{hashlib.sha256(facts.encode()).hexdigest()[:16]}" / "rates.json"


def known_rates(dtype: torch.dtype, threads: int) -> Rates | None:
    """The rates that were measured before, or None."""
    try:
        values = json.loads(rates_file(dtype, threads).read_text(encoding="utf-8"))
        read: dict[str, Any] = {name: {int(k): v for k, v in value.items()} if isinstance(value, dict) else value
                                for name, value in values.items()}
        return Rates(**read)
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def calibrate(dtype: torch.dtype, threads: int) -> Rates:
    """Measure this machine, in well under two minutes, and keep what was found.

    Everything is measured twice, one round after the other, and the quicker counts: another process that was busy for
    some seconds must not pass for the machine.
    """
    began = time.perf_counter()
    with _threads(threads):
        rounds = [_round(dtype) for _ in range(2)]
    found = Rates(seconds=round(time.perf_counter() - began, 1), start=min(r["start"] for r in rounds),
                  **{name: _quicker(*(r[name] for r in rounds)) for name in rounds[0] if name != "start"})
    file = rates_file(dtype, threads)
    file.parent.parent.mkdir(parents=True, exist_ok=True)
    replace_folder(file.parent, {file.name: json.dumps(asdict(found)).encode()})
    return found


def _round(dtype: torch.dtype) -> dict[str, Any]:
    """Every figure once."""
    with torch.no_grad():
        found = {"narrow_output": {n: _product(dtype, 1024, n, _WIDE) for n in NARROW},
                 "narrow_inner": {k: _product(dtype, 1024, _WIDE, k) for k in NARROW},
                 "attention": _attention(dtype), "batched": _batched(dtype),
                 "bytes": {n: _added(dtype, n) for n in SIZES}, "drawn": _drawn(dtype)}
        found |= kernel_rates(seconds, unpacking=_has_bitsandbytes()) if dtype == torch.bfloat16 else {}
        if "unpack" not in found:
            found["unpack"] = _unpacked(dtype)
    found["adamw8bit"] = {n: _updated(n) for n in STATES} if _has_bitsandbytes() else {}
    return found | {"start": _start()}


def _quicker(one: Any, other: Any) -> Any:
    """The higher rate, of each size where there are several."""
    return {size: max(rate, other[size]) for size, rate in one.items()} if isinstance(one, dict) else max(one, other)


def seconds(run: Callable[[], object]) -> float:
    """The median time of a call, repeated for about a fifth of a second."""
    run()
    times: list[float] = []
    while (sum(times) < 10 * _LEAST_S and len(times) < 50) or len(times) < 3:
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
        if sum(times) > _MOST_S:
            break
    return statistics.median(times)


def _product(dtype: torch.dtype, rows: int, outputs: int, inner: int) -> float:
    x, W = torch.randn(rows, inner).to(dtype), torch.randn(outputs, inner).to(dtype)
    y = x.new_empty(rows, outputs)
    return 2.0 * rows * outputs * inner / seconds(lambda: torch.mm(x, W.t(), out=y))


def _attention(dtype: torch.dtype) -> float:
    q = torch.randn(2, 8, 512, 64).to(dtype)
    took = seconds(lambda: causal_attention(q, q, q, 64**-0.5))
    return 4.0 * 2 * 8 * 64 * 512 * 512 / 2 / took


def _batched(dtype: torch.dtype) -> float:
    """Scores and what they make of the values, as a model computes them that has dropout inside attention."""
    q, k, v = (torch.randn(8, 128, 12, 64).to(dtype).transpose(1, 2) for _ in range(3))
    took = seconds(lambda: q @ k.transpose(-1, -2) @ v)
    return 4.0 * 8 * 12 * 64 * 128 * 128 / took


def _added(dtype: torch.dtype, values: int) -> float:
    a, b = torch.ones(values, dtype=dtype), torch.ones(values, dtype=dtype)
    return 3.0 * values * a.element_size() / seconds(lambda: a + b)


def _drawn(dtype: torch.dtype) -> float:
    mask = torch.empty(_MASK, dtype=dtype)
    return _MASK / seconds(lambda: mask.bernoulli_(0.9))


def _has_bitsandbytes() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


def _updated(values: int) -> float:
    parameter = torch.nn.Parameter(torch.zeros(values))
    parameter.grad = torch.ones(values)
    return values / seconds(importlib.import_module("bitsandbytes").optim.AdamW8bit([parameter]).step)


def _unpacked(dtype: torch.dtype) -> float:
    if not _has_bitsandbytes():
        return 0.0
    W = torch.randn(1024, 4096)
    packed, workspace = as_nf4(W), Workspace()

    def unpack() -> None:
        for _ in packed.strips(dtype, workspace):
            pass

    return W.numel() / seconds(unpack)


def _start() -> float:
    """A small operation and its backward pass, per operation."""
    x = torch.ones(8, requires_grad=True)

    def chain() -> None:
        y = x
        for _ in range(20):
            y = y * 1.5
        y.sum().backward()  # type: ignore[no-untyped-call]

    return seconds(chain) / 42


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
                platform.machine())
