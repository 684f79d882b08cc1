"""Peak memory of a training step, each side in a fresh process: ours beside peft, and how it grows with length.

    python benchmarks/memory.py [--quick] [--dtype bf16|fp32] [--layers 30] [--only step|growth]
                                [--device cpu|cuda] [--shape smollm2|llama1b|llama7b] [--rows 4 --tokens 256]

SmolLM2-135M's shapes, all-linear r=8, 4 x 256 tokens, every one learned from. The figure is the most that the process
ever held, libraries and weights included. Growth is from 512 to 2,048 tokens in one row: layers whose activations are
computed again, beside those that are kept.

On a GPU the figure is the most that its allocator had given out, what it held for the process is printed beside it, and
growth is measured up to 8,192 tokens as well. The processes then run side by side: each has an allocator of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from pairs import Case, report
from shapes import LINEAR, SHAPES, batch_of, model_of

MIB = 1 << 20


def child(args: argparse.Namespace) -> None:
    """Three steps of one side; prints the peak in bytes and the losses."""
    side, device = args.child, args.device
    model = model_of(args.shape, getattr(torch, args.dtype), args.layers, device)
    batch = batch_of(args.rows, args.tokens, device)
    stack = ExitStack()
    if side.startswith("peft"):
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(
            r=8, lora_alpha=16, target_modules=LINEAR, task_type="CAUSAL_LM"),
            autocast_adapter_dtype=side != "peft 16-bit").train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

        def loss() -> torch.Tensor:
            with torch.autocast(device, torch.bfloat16, enabled=side == "peft autocast"):
                return model(**batch).loss
    else:
        import deltaw
        from deltaw.bases.gated import gated_modules, product_made_again
        from deltaw.bases.norms import keeping_less, norm_modules
        from deltaw.bases.rotary import rotary_in_one_pass
        from deltaw.train.compile import compiled_layers
        from deltaw.train.memory import give_back, recompute_activations, release_at_once
        from deltaw.train.objective import CausalLoss
        from deltaw.train.optimizer import adamw

        board = deltaw.attach(model, deltaw.LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR), seed=0)
        objective = CausalLoss()

        def look() -> None:
            objective.loss(model, {n: t[:1, :64] for n, t in batch.items()})

        board.share_inputs(look)
        stack.enter_context(rotary_in_one_pass(model))
        stack.enter_context(keeping_less(norm_modules(model, look)))
        if side == "recomputed":
            recompute_activations(model)
            release_at_once()
        else:
            stack.enter_context(product_made_again(gated_modules(model, look)))
        if side == "compiled":
            stack.enter_context(compiled_layers(model))
        optimizer = adamw(board.parameters("default"), learning_rate=1e-4)
        units = objective.units(batch)

        def loss() -> torch.Tensor:
            return objective.loss(model, batch) / units

    before = highest(device)["peak"]
    losses = []
    for _ in range(3):
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if side == "released":
            give_back()
        losses.append(value.item())
    print(json.dumps(highest(device) | {"before": before, "losses": losses}))


def highest(device: str) -> dict[str, int]:
    """The most bytes that this process had so far, and that a GPU's allocator held for it."""
    if device == "cuda":
        return {"peak": torch.cuda.max_memory_allocated(), "held": torch.cuda.max_memory_reserved()}
    import resource

    return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def measured(args: argparse.Namespace, runs: list[tuple[str, int, int]]) -> list[dict]:
    """The figures of each side, rows and tokens, from a process of its own."""
    def run(side: str, rows: int, tokens: int) -> dict:
        command = [sys.executable, __file__, "--child", side, "--dtype", args.dtype, "--layers", str(args.layers),
                   "--rows", str(rows), "--tokens", str(tokens), "--device", args.device, "--shape", args.shape]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.strip().splitlines()[-1])
        held = f"{found['held'] / MIB:6.0f} held, " if "held" in found else ""
        print(f"  {side:11} {rows} x {tokens:4} {args.dtype}: peak {found['peak'] / MIB:6.0f} MiB, {held}"
              f"{found['before'] / MIB:5.0f} before the first step, loss {found['losses'][0]:.4f}", flush=True)
        return found

    together = 1 if args.device == "cpu" else 2 if args.shape == "llama7b" else 4
    with ThreadPoolExecutor(together) as pool:
        return list(pool.map(lambda one: run(*one), runs))


def main() -> int:
    """Measure all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 layers")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--shape", choices=[name for name in SHAPES if name != "bert"], default="smollm2")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", choices=["step", "growth"], help="one half of it")
    parser.add_argument("--vs", default="peft", choices=["peft"])
    parser.add_argument("--child")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    args = parser.parse_args()
    args.dtype = {"bf16": "bfloat16", "fp32": "float32"}.get(args.dtype, args.dtype)
    args.layers = args.layers or (4 if args.quick else SHAPES[args.shape]["num_hidden_layers"])
    if args.child:
        child(args)
        return 0
    cases = []
    if args.only != "growth":
        cases += of_a_step(args)
    if args.only != "step":
        cases += of_longer_rows(args)
    return report("memory", cases, args.device) and 0


def of_a_step(args: argparse.Namespace) -> list[Case]:
    """Ours beside peft; giving memory back to the system is for a heap, and not for a GPU."""
    gpu, fp32 = args.device == "cuda", args.dtype == "float32"
    ours = {"ours": ""} | ({} if gpu else {"released": ", release_memory"}) | (
        {} if args.quick else {"compiled": ", compiled"})
    rivals = ["peft"] if fp32 else ["peft", "peft autocast", "peft 16-bit"]
    sides = [*rivals, *ours]
    found = dict(zip(sides, measured(args, [(side, args.rows, args.tokens) for side in sides]), strict=True))
    cases = []
    for side, what in ours.items():
        for rival in rivals:
            loss, theirs = found[side]["losses"][0], found[rival]["losses"][0]
            cases.append(Case(f"peak of a step {args.rows} x {args.tokens}, {args.shape}, {args.dtype}{what}", "MiB",
                              found[side]["peak"] / MIB, found[rival]["peak"] / MIB, rival, 0.55,
                              equal=abs(loss - theirs) <= (1e-4 if fp32 else 2e-2) * theirs))
    return cases


def of_longer_rows(args: argparse.Namespace) -> list[Case]:
    """From 512 to 2,048 tokens in a row, on a GPU to 8,192: layers computed again beside layers kept."""
    lengths = [512, 1024, 2048] + ([4096, 8192] if args.device == "cuda" else [])
    runs = [(side, 1, tokens) for side in ("ours", "recomputed") for tokens in lengths]
    peaks = {(side, tokens): found["peak"] / MIB
             for (side, _, tokens), found in zip(runs, measured(args, runs), strict=True)}
    cases = []
    for short, middle, long in zip(lengths[::2], lengths[1::2], lengths[2::2], strict=False):
        kept, again = ([peaks[side, tokens] for tokens in (short, middle, long)] for side in ("ours", "recomputed"))
        cases += [Case(f"growth {middle} to {long} / twice {short} to {middle}, recomputed", "MiB", again[2] - again[1],
                       2 * (again[1] - again[0]), "linear", 1.15),
                  Case(f"growth {short} to {long}, recomputed / kept", "MiB", again[2] - again[0], kept[2] - kept[0],
                       "kept", 1 / 3)]
    return cases


if __name__ == "__main__":
    raise SystemExit(main())
