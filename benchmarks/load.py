"""Loading an adapter from its folder onto a base that has 16 attached, beside peft; and with up to 256 attached.

    python benchmarks/load.py [--quick] [--layers 30]

SmolLM2-135M's shapes, all-linear r=8, bf16 base. Both sides read the same folder, which ours wrote; the check compares
the logits of the loaded adapters.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from pairs import Case, report
from shapes import model_of

import deltaw

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> int:
    """Write an adapter, then load it again and again on both sides."""
    import peft

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--layers", type=int, help="layers of the model; 30, or 6 with --quick")
    parser.add_argument("--vs", default="peft", choices=["peft"])
    args = parser.parse_args()
    layers = args.layers or (6 if args.quick else 30)
    repeats = 5 if args.quick else 15
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter"
        model = model_of("smollm2", torch.bfloat16, layers).eval()
        config = deltaw.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, init_lora_weights=False)
        board = deltaw.attach(model, config, name="first", seed=3)
        start = time.perf_counter()
        board.adapter("first").save(path)
        seconds, size = time.perf_counter() - start, sum(f.stat().st_size for f in path.iterdir())
        print(f"  save: {seconds:.3f} s, {size / 1e6:.1f} MB")
        rival = peft.get_peft_model(model_of("smollm2", torch.bfloat16, layers).eval(),
                                    peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)).eval()
        for i in range(15):
            board.add(f"a{i}", config)
            rival.add_adapter(f"a{i}", peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))
        cases = _compare(model, board, rival, path, repeats)
        cases.append(_flat(board, path, 256))
    report("load", cases)
    return 0


def _compare(model, board, rival, path, repeats) -> list[Case]:
    times: dict[str, list[float]] = {"ours": [], "fast": [], "peft": []}
    for i in range(repeats + 1):
        start = time.perf_counter()
        board.add(f"load{i}", deltaw.load(path))
        times["ours"].append(time.perf_counter() - start)
        start = time.perf_counter()
        rival.load_adapter(path, f"load{i}")
        times["peft"].append(time.perf_counter() - start)
        start = time.perf_counter()
        rival.load_adapter(path, f"fast{i}", low_cpu_mem_usage=True)
        times["fast"].append(time.perf_counter() - start)
        ids = torch.randint(0, 49152, (2, 16), generator=torch.Generator().manual_seed(i))
        if i == 0:
            board.use("load0")
            rival.set_adapter("load0")
            with torch.no_grad():
                a, b = model(ids).logits.float(), rival(ids).logits.float()
            same = bool((a - b).abs().max() / b.std() < 0.25)
        for name in (f"load{i}", f"fast{i}"):
            rival.delete_adapter(name)
        board.remove(f"load{i}")
    median = {side: sorted(values[1:])[repeats // 2] for side, values in times.items()}
    return [Case("load and add, 16 attached", "s", median["ours"], median["peft"], "peft", 0.1, equal=same),
            Case("the same, peft with low_cpu_mem_usage", "s", median["ours"], median["fast"], "peft", 0.1, equal=same)]


def _flat(board, path, up_to: int) -> Case:
    times = []
    while len(board.names) < up_to:
        start = time.perf_counter()
        board.add(f"n{len(board.names)}", deltaw.load(path))
        times.append(time.perf_counter() - start)
    first, last = sorted(times[:20])[10], sorted(times[-20:])[10]
    return Case(f"load and add, {up_to} attached / 16 attached", "s", last, first, "at 16", 1.5)


if __name__ == "__main__":
    raise SystemExit(main())
