"""Unpacking 4-bit weights on a GPU, beside bitsandbytes' `dequantize_4bit`.

    python benchmarks/unpack.py [--quick] [--kind nf4|fp4] [--dtype bf16|fp32]

Layers of Llama-2-7B's shapes, with double quantization and without, packed from the format that is computed in, so that
bitsandbytes need not convert. A turn unpacks a different layer with each call, more of them than a GPU's cache holds,
as a training step does, and lets go of each before the next. All numbers of all layers are compared.

The rate is that of the GPU alone: turns are recorded as a CUDA graph and replayed. It counts what has to be moved, the
codes, the scales and the numbers, on both sides; W goes to the same memory each time, some of it to the GPU's cache. A
call's time is what Python takes too, where that is the longer. (In a training step the GPU is busy with products
meanwhile.) Where there is no GPU nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from pairs import Case, report, timed

from deltaw.core.packed import Packed
from deltaw.core.unpacking_gpu import unpacked

SHAPES = [(4096, 4096), (11008, 4096)]
GOAL = 2000.0
"""Billion bytes a second: two thirds of what an H100's memory moves."""


def layers_of(shape: tuple[int, int], kind: str, dtype: torch.dtype, count: int, *, nested: bool) -> list[Packed]:
    from bitsandbytes.functional import quantize_4bit

    def layer() -> Packed:
        W = torch.randn(shape, device="cuda", dtype=dtype)
        codes, state = quantize_4bit(W, quant_type=kind, compress_statistics=nested)
        return Packed(kind, codes, shape, state.absmax, state)  # type: ignore[arg-type]

    return [layer() for _ in range(count)]


def moved(layer: Packed, dtype: torch.dtype) -> float:
    """Bytes that are read and written at least."""
    scales = [layer.absmax, *([layer.state.state2.absmax] if layer.state.nested else [])]
    return math.prod(layer.shape) * dtype.itemsize + layer.codes.nbytes + sum(scale.nbytes for scale in scales)


def cases_of(shape: tuple[int, int], kind: str, dtype: torch.dtype, count: int, turns: int, *,
             nested: bool) -> list[Case]:
    from bitsandbytes.functional import dequantize_4bit

    layers = layers_of(shape, kind, dtype, count, nested=nested)

    def ours(layer: Packed) -> Any:
        return unpacked(layer.codes, layer.state, dtype)

    def theirs(layer: Packed) -> Any:
        return dequantize_4bit(layer.codes, layer.state)

    def same(layer: Packed) -> bool:
        W = ours(layer)
        return W is not None and torch.equal(W, theirs(layer))

    def turn(unpack: Callable[[Packed], Any]) -> Callable[[], None]:
        def run() -> None:
            for layer in layers:
                unpack(layer)
        return run

    equal = all(same(layer) for layer in layers)
    called = medians(turn(ours), turn(theirs), count, turns)
    alone = medians(recorded(turn(ours)), recorded(turn(theirs)), count, turns)
    rate = moved(layers[0], dtype) / 1e9
    what = f"{kind} {shape[0]} x {shape[1]}, {'packed' if nested else 'plain'} scales"
    return [Case(what, "GB/s", rate / alone[0], rate / alone[1], "bitsandbytes", 2.0, "higher", equal=equal),
            Case(what, "GB/s", rate / alone[0], GOAL, "goal", 1.0, "higher", equal=equal),
            Case(f"{what}, a call", "us", called[0] * 1e6, called[1] * 1e6, "bitsandbytes", 0.8, equal=equal)]


def recorded(turn: Callable[[], None]) -> Callable[[], None]:
    """The GPU's part of a turn, without Python's."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        turn()
    return graph.replay


def medians(ours: Callable[[], None], theirs: Callable[[], None], count: int, turns: int) -> tuple[float, float]:
    """Seconds for each of the `count` layers of a turn, in turns, after three that are not counted."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(turns + 3):
        for side, run in zip(times, (ours, theirs), strict=True):
            side.append(timed(run, "cuda")[0] / count)
    return statistics.median(times[0][3:]), statistics.median(times[1][3:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 layers and 5 turns, instead of 32 and 20")
    parser.add_argument("--kind", choices=["nf4", "fp4"], default="nf4")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing to compare")
        print(json.dumps({"benchmark": "unpack", "cases": []}))
        return 0
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    torch.manual_seed(0)
    count, turns = (8, 5) if args.quick else (32, 20)
    cases = [case for shape in SHAPES for nested in (True, False)
             for case in cases_of(shape, args.kind, dtype, count, turns, nested=nested)]
    return report("unpack", cases, "cuda") and 0


if __name__ == "__main__":
    raise SystemExit(main())
