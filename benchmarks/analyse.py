"""`analyse` of a 7B-shaped adapter without its base, beside dense decompositions of ΔW; time and memory.

    python benchmarks/analyse.py [--quick] [--layers 32] [--rank 64]

All-linear rank 64 on Llama-2-7B's shapes: 224 sites of random factors, saved in bf16 and read back, as the verb reads
them. The rival forms ΔW and decomposes it with torch.linalg.svdvals; that takes minutes a site at this size, so it is
timed on matrices of 1024 rows and columns, where ours is timed too, and the equality of the spectra is checked there.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from pairs import Case, alternate, report

from deltaw import store
from deltaw.analyse import analyse, decompose
from deltaw.analyse.factors import factors_of
from deltaw.core import Adapter, Geometry, LoraConfig, SiteDelta

SHAPES = {"self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (4096, 4096), "self_attn.v_proj": (4096, 4096),
          "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (11008, 4096), "mlp.up_proj": (11008, 4096),
          "mlp.down_proj": (4096, 11008)}
SECONDS, BYTES = 60.0, 4 * 2**30


def adapter(layers: int, rank: int) -> Adapter:
    """Random factors at every linear layer."""
    sites = {}
    for layer in range(layers):
        for name, (out, inp) in SHAPES.items():
            tensors = {"lora_A": torch.randn(rank, inp).mul_(inp**-0.5).bfloat16(),
                       "lora_B": torch.randn(out, rank).mul_(0.01).bfloat16()}
            sites[f"model.layers.{layer}.{name}"] = SiteDelta(Geometry(kind="linear", shape=(out, inp)), tensors)
    return Adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"), sites)


def small_case(rank: int) -> Case:
    """One site of 1024 x 1024: the spectrum from the factors, and from ΔW itself."""
    geometry = Geometry(kind="linear", shape=(1024, 1024))
    site = SiteDelta(geometry, {"lora_A": torch.randn(rank, 1024), "lora_B": torch.randn(1024, rank)})
    value = Adapter(LoraConfig(r=rank, lora_alpha=rank), {"a": site})
    (factors,) = factors_of(value, "a")
    exact = torch.linalg.svdvals(value.delta("a").double())[:rank]
    equal = torch.allclose(decompose(factors).S_K, exact, rtol=1e-4)
    ours, rival = alternate(lambda: decompose(factors), lambda: torch.linalg.svdvals(value.delta("a").double()), 3)
    return Case("spectrum of one 1024 x 1024 site", "s", ours, rival, "dense SVD", 0.2, equal=equal)


def main() -> int:
    """Measure, print, and return how many targets were missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rank", type=int, default=64)
    options = parser.parse_args()
    layers = 4 if options.quick else options.layers
    with tempfile.TemporaryDirectory() as folder:
        value = adapter(layers, options.rank)
        value.save(folder)
        del value
        began = time.perf_counter()
        found = analyse({"seven": store.load(folder)})
        seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sites = len(found.adapters[0].sites)
    share = layers / 32  # a part of the layers may take that part of the time
    cases = [Case(f"analyse {sites} sites", "s", seconds, SECONDS * share, "target", 1.0, limit=SECONDS * share),
             Case(f"peak memory, {sites} sites", "bytes", peak, BYTES, "target", 1.0, limit=BYTES),
             small_case(options.rank)]
    return report("analyse", cases)


if __name__ == "__main__":
    sys.exit(min(1, main()))
