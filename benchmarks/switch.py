"""Adding, switching, merging and mixing 16 adapters on one base, beside peft: SmolLM2-135M's shapes, all-linear r=8.

    python benchmarks/switch.py [--quick] [--dtype bf16|fp32] [--layers 30]

Each case checks that both sides compute the same before it is timed. A quick run has fewer layers. Where the processor
has no bf16 instructions, our low-rank products over a bf16 base are asked for in float32 (`compute_dtype`).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from pairs import Case, alternate, report
from shapes import model_of

import deltaw
from deltaw.bases import choose_dtype

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
N = 16


def build(dtype: torch.dtype, layers: int):
    """Our model and peft's with the same base and the same 16 adapters."""
    import peft

    ours_model, peft_model = model_of("smollm2", dtype, layers).eval(), model_of("smollm2", dtype, layers).eval()
    config = deltaw.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)
    native, reason = choose_dtype("auto", "cpu")
    narrow = None if dtype == torch.float32 or native == torch.bfloat16 else torch.float32
    if narrow is not None:
        print(f"  low-rank products in float32: {reason}")
    board = deltaw.attach(ours_model, config, name="a0", seed=0, compute_dtype=narrow)
    for i in range(1, N):
        board.add(f"a{i}", config, seed=i)
    peft_config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)
    rival = peft.get_peft_model(peft_model, peft_config, adapter_name="a0").eval()
    for i in range(1, N):
        rival.add_adapter(f"a{i}", peft_config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for i in range(N):
            for site, tensors in _by_site(board, f"a{i}").items():
                layer = rival.base_model.model.get_submodule(site)
                tensors["lora_B"].normal_(std=0.02, generator=generator)
                layer.lora_A[f"a{i}"].weight.copy_(tensors["lora_A"])
                layer.lora_B[f"a{i}"].weight.copy_(tensors["lora_B"])
    return ours_model, board, rival, config, peft_config


def _by_site(board, name):
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, parameter in board.parameters(name).items():
        site, _, tensor = key.rpartition(".")
        found.setdefault(site, {})[tensor] = parameter
    return found


def close(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether logits agree to the dtype's rounding through 30 layers (relative to their spread)."""
    difference = (a.float() - b.float()).abs().max() / b.float().std()
    return bool(difference < (1e-4 if dtype == torch.float32 else 0.25))


@torch.no_grad()
def forwards(model, board, rival, dtype, repeats) -> list[Case]:
    """One unmerged adapter, and 16 in one batch, against the same model's own base forward."""
    names = [f"a{i}" for i in range(N)]
    cases = []
    for tokens, one_target, mixed_target in ((64, 1.15, 1.3), (1, 1.5, 1.5)):
        ids = torch.randint(0, 49152, (N, tokens), generator=torch.Generator().manual_seed(1))

        def base(ids=ids):
            with board.off():
                return model(ids).logits

        def ours_one(ids=ids):
            board.use("a1")
            return model(ids).logits

        def ours_mixed(ids=ids):
            with board.route(names):
                return model(ids).logits

        def rival_one(ids=ids):
            return rival(ids).logits

        def rival_mixed(ids=ids):
            return rival(input_ids=ids, adapter_names=names).logits

        rival.set_adapter("a1")
        reps = repeats if tokens > 1 else repeats * 3
        same_one, same_mixed = close(ours_one(), rival_one(), dtype), close(ours_mixed(), rival_mixed(), dtype)
        for label, mine, its, target, same in (("one adapter", ours_one, rival_one, one_target, same_one),
                                               ("16 adapters", ours_mixed, rival_mixed, mixed_target, same_mixed)):
            t, t_base = alternate(mine, base, reps)
            t_peft, t_base2 = alternate(its, base, max(3, reps // 3))
            cases.append(Case(f"forward 16x{tokens}, {label} / base", "s", t, t_base, "base", target, equal=same))
            print(f"  peft, forward 16x{tokens}, {label} / base: {t_peft / t_base2:.2f}")
    return cases


def switching(model, board, rival, config, peft_config, repeats) -> list[Case]:
    """Adding with 16 attached, `use`, merge and unmerge."""
    counter = iter(range(10**6))

    def ours_add():
        name = f"x{next(counter)}"
        board.add(name, config)
        return name

    def rival_add():
        name = f"y{next(counter)}"
        rival.add_adapter(name, peft_config)
        return name

    add = _timed_with_cleanup(ours_add, board.remove, rival_add, rival.delete_adapter, repeats)
    cases = [Case("add an adapter, 16 attached", "s", *add, "peft", 0.1)]
    toggles = {"ours": 0, "rival": 0}

    def ours_use():
        toggles["ours"] += 1
        board.use(f"a{toggles['ours'] % N}")

    def rival_use():
        toggles["rival"] += 1
        rival.set_adapter(f"a{toggles['rival'] % N}")

    cases.append(Case("use / set_adapter", "s", *alternate(ours_use, rival_use, 20), "peft", 1.0))
    cases.append(Case("use, against 1 ms", "s", cases[-1].ours, 1e-3, "1 ms", 1.0))
    rival.set_adapter("a1")
    board.use("a1")
    times: dict[str, list[float]] = {k: [] for k in ("merge", "unmerge", "pmerge", "punmerge")}
    for _ in range(repeats):
        for key, run in (("merge", lambda: board.merge("a1")), ("unmerge", board.unmerge),
                         ("pmerge", lambda: rival.merge_adapter(["a1"])), ("punmerge", rival.unmerge_adapter)):
            start = time.perf_counter()
            run()
            times[key].append(time.perf_counter() - start)
    median = {k: sorted(v)[len(v) // 2] for k, v in times.items()}
    return [*cases, Case("merge", "s", median["merge"], median["pmerge"], "peft", 1.0),
            Case("unmerge", "s", median["unmerge"], median["punmerge"], "peft", 1.0)]


def _timed_with_cleanup(ours, ours_undo, rival, rival_undo, repeats) -> tuple[float, float]:
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 1):
        for side, run, undo in ((times[0], ours, ours_undo), (times[1], rival, rival_undo)):
            start = time.perf_counter()
            name = run()
            if turn:
                side.append(time.perf_counter() - start)
            undo(name)
    return tuple(sorted(t)[len(t) // 2] for t in times)


def flat(model, board, config) -> Case:
    """Adding the 256th adapter beside adding the 17th."""
    times = []
    for i in range(240):
        start = time.perf_counter()
        board.add(f"f{i}", config)
        times.append(time.perf_counter() - start)
    for i in range(240):
        board.remove(f"f{i}")
    first, last = sorted(times[:20])[10], sorted(times[-20:])[10]
    return Case("add, 256 attached / 16 attached", "s", last, first, "at 16", 1.5)


def drift(layers: int, switches: int) -> list[Case]:
    """Share of base weights changed after many merge/unmerge switches between two adapters; peft after 21."""
    import peft

    cases = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model = model_of("smollm2", dtype, layers).eval()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        config = deltaw.LoraConfig(r=8, target_modules=TARGETS, init_lora_weights=False)
        board = deltaw.attach(model, config, name="a", seed=0)
        board.add("b", config, seed=1)
        for i in range(switches):
            board.merge("ab"[i % 2])
            board.unmerge()
        changed = _changed(before, dict(model.named_parameters()))
        rival_base = model_of("smollm2", dtype, layers).eval()
        rival_before = {n: p.detach().clone() for n, p in rival_base.named_parameters()}
        rival = peft.get_peft_model(rival_base, peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS,
                                                               init_lora_weights=False))
        for _ in range(21):
            rival.merge_adapter()
            rival.unmerge_adapter()
        names = {n.replace(".base_layer", "").removeprefix("base_model.model."): p
                 for n, p in rival.named_parameters() if "lora_" not in n}
        its = _changed(rival_before, names)
        print(f"  {dtype}: peft changed {its:.1%} of adapted weights after 21 switches")
        cases.append(Case(f"weights changed after {switches} switches, {str(dtype)[6:]}", "share", changed, 1.0, "all",
                          0.0))
    return cases


def _changed(before, after) -> float:
    adapted = [n for n in before if any(t in n for t in TARGETS)]
    total = sum(before[n].numel() for n in adapted)
    return sum(int((before[n] != after[n]).sum()) for n in adapted) / total


def main() -> int:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--layers", type=int, help="layers of the model; 30, or 6 with --quick")
    parser.add_argument("--vs", default="peft", choices=["peft"])
    args = parser.parse_args()
    layers = args.layers or (6 if args.quick else 30)
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    repeats = 5 if args.quick else 9
    model, board, rival, config, peft_config = build(dtype, layers)
    cases = forwards(model, board, rival, dtype, repeats)
    cases += switching(model, board, rival, config, peft_config, repeats)
    cases.append(flat(model, board, config))
    del model, board, rival
    cases += drift(1 if args.quick else 4, 1000)
    return report("switch", cases) and 0


if __name__ == "__main__":
    raise SystemExit(main())
