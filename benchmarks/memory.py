"""Peak memory of a training step, each side in a fresh process: ours beside peft, and how it grows with length.

    python benchmarks/memory.py [--quick] [--dtype bf16|fp32] [--layers 30] [--only step|growth]

SmolLM2-135M's shapes, all-linear r=8, 4 x 256 tokens, every one learned from. The figure is the most that the process
ever held, libraries and weights included. Growth is from 512 to 2,048 tokens in one row: layers whose activations are
computed again, beside those that are kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from pairs import Case, report
from train_step import LINEAR

MIB = 1 << 20


def child(side: str, dtype: str, layers: int, rows: int, tokens: int) -> None:
    """Three steps of one side; prints the peak in bytes and the losses."""
    import resource

    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=8192)).train()
    torch.set_default_dtype(torch.float32)
    ids = torch.randint(5, 49000, (rows, tokens), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    stack = ExitStack()
    if side == "peft":
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR,
                                                           task_type="CAUSAL_LM")).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

        def loss() -> torch.Tensor:
            return model(**batch).loss
    else:
        import deltaw
        from deltaw.bases.gated import gated_modules, product_made_again
        from deltaw.train.compile import compiled_layers
        from deltaw.train.memory import give_back, recompute_activations, release_at_once
        from deltaw.train.objective import CausalLoss
        from deltaw.train.optimizer import adamw

        board = deltaw.attach(model, deltaw.LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR), seed=0)
        objective = CausalLoss()

        def look() -> None:
            objective.loss(model, {n: t[:1, :64] for n, t in batch.items()})

        board.share_inputs(look)
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

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    losses = []
    for _ in range(3):
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if side == "released":
            give_back()
        losses.append(value.item())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak": peak, "before": before, "losses": losses}))


def measured(side: str, dtype: str, layers: int, rows: int, tokens: int) -> dict:
    """The child's figures."""
    command = [sys.executable, __file__, "--child", side, "--dtype", dtype, "--layers", str(layers), "--rows",
               str(rows), "--tokens", str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"  {side:10} {rows} x {tokens:4} {dtype}: peak {found['peak'] / MIB:6.0f} MiB, {found['before'] / MIB:5.0f} "
          f"before the first step, loss {found['losses'][0]:.4f}")
    return found


def main() -> int:
    """Measure all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 layers")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--only", choices=["step", "growth"], help="one half of it")
    parser.add_argument("--vs", default="peft", choices=["peft"])
    parser.add_argument("--child")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    args = parser.parse_args()
    dtype = {"bf16": "bfloat16", "fp32": "float32"}.get(args.dtype, args.dtype)
    layers = args.layers or (4 if args.quick else 30)
    if args.child:
        child(args.child, dtype, layers, args.rows, args.tokens)
        return 0
    cases = []
    if args.only != "growth":
        cases += of_a_step(args.dtype, dtype, layers, quick=args.quick)
    if args.only != "step":
        cases += of_longer_rows(dtype, layers)
    return report("memory", cases) and 0


def of_a_step(label: str, dtype: str, layers: int, *, quick: bool) -> list[Case]:
    """Ours beside peft, 4 x 256 tokens."""
    peft = measured("peft", dtype, layers, 4, 256)
    sides = {"ours": "", "released": ", release_memory"} | ({} if quick else {"compiled": ", compiled"})
    cases = []
    for side, what in sides.items():
        found = measured(side, dtype, layers, 4, 256)
        near = abs(found["losses"][0] - peft["losses"][0]) <= (1e-4 if dtype == "float32" else 2e-2) * peft["losses"][0]
        cases.append(Case(f"peak of a step 4 x 256, {label}{what}", "MiB", found["peak"] / MIB, peft["peak"] / MIB,
                          "peft", 0.55, equal=near))
    return cases


def of_longer_rows(dtype: str, layers: int) -> list[Case]:
    """From 512 to 2,048 tokens in a row: layers computed again beside layers kept."""
    kept, again = ([measured(side, dtype, layers, 1, tokens)["peak"] / MIB for tokens in (512, 1024, 2048)]
                   for side in ("ours", "recomputed"))
    return [Case("growth 1024 to 2048 / twice 512 to 1024, recomputed", "MiB", again[2] - again[1],
                 2 * (again[1] - again[0]), "linear", 1.15),
            Case("growth 512 to 2048, recomputed / kept", "MiB", again[2] - again[0], kept[2] - kept[0], "kept", 1 / 3)]


if __name__ == "__main__":
    raise SystemExit(main())
