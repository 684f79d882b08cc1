"""One training step: ours beside peft, full fine-tuning and the floor, on the same batch.

    python benchmarks/train_step.py [--quick] [--dtype auto|fp32|bf16] [--layers 30] [--shape smollm2|qwen|bert] [--qv]

Every token is learned from (4 x 256), so nothing is gained by leaving logits out. The floor is a forward and backward
pass through the frozen model in plain operations. peft runs with its best settings: fused AdamW, and once more with its
layers compiled. All sides start from the same factors; their losses over the steps must agree.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from pairs import Case, gemm_rate, report, smollm2_shaped

import deltaw
from deltaw.bases import choose_dtype
from deltaw.bases.gated import gated_modules, product_made_again
from deltaw.train.compile import compiled_layers
from deltaw.train.cross_entropy import Terms
from deltaw.train.objective import CausalLoss, ClassLoss
from deltaw.train.optimizer import adamw

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BERT = ["query", "key", "value", "dense"]
Step = Callable[[], float]


def model_of(shape: str, dtype: torch.dtype, layers: int | None) -> torch.nn.Module:
    """A randomly initialised network of this shape, in training mode."""
    from transformers import BertConfig, BertForSequenceClassification, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    if shape == "smollm2":
        return smollm2_shaped(dtype, layers or 30).train()
    if shape == "qwen":  # Qwen2.5-0.5B's
        return Qwen2ForCausalLM(Qwen2Config(
            vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=layers or 24,
            num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True)).to(dtype).train()
    return BertForSequenceClassification(BertConfig(
        num_labels=3, num_hidden_layers=layers or 12, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0)).to(dtype).train()


def batch_of(shape: str) -> dict[str, torch.Tensor]:
    """4 x 256 tokens, all of them learned from; for the classifier 16 x 64 with a label each."""
    generator = torch.Generator().manual_seed(1)
    rows, tokens = (16, 64) if shape == "bert" else (4, 256)
    ids = torch.randint(5, 30000, (rows, tokens), generator=generator)
    labels = torch.randint(0, 3, (rows,), generator=generator) if shape == "bert" else ids
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


class Sides:
    """The step of each side, as a function that returns its loss."""

    def __init__(self, shape: str, dtype: torch.dtype, layers: int | None, targets: list[str],
                 stack: ExitStack) -> None:
        self.shape, self.dtype, self.layers, self.targets, self.stack = shape, dtype, layers, targets, stack
        self.batch = batch_of(shape)
        self.objective = ClassLoss(Terms()) if shape == "bert" else CausalLoss()

    def model(self) -> torch.nn.Module:
        return model_of(self.shape, self.dtype, self.layers)

    def ours(self, *, compiled: bool) -> Step:
        model = self.model()
        board = deltaw.attach(model, deltaw.LoraConfig(r=8, lora_alpha=16, target_modules=self.targets), seed=0)

        def look() -> None:
            self.objective.loss(model, {n: t[:1] for n, t in self.batch.items()})

        board.share_inputs(look)
        self.stack.enter_context(product_made_again(gated_modules(model, look)))
        parameters = board.parameters("default")
        self.factors = {name: p.detach().clone() for name, p in parameters.items()}
        optimizer = adamw(parameters, learning_rate=1e-4)
        if compiled:
            self.stack.enter_context(compiled_layers(model))
        units = self.objective.units(self.batch)

        def step() -> float:
            loss = self.objective.loss(model, self.batch) / units
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.item()

        return step

    def peft(self, *, compiled: bool) -> Step:
        import peft

        task = "SEQ_CLS" if self.shape == "bert" else "CAUSAL_LM"
        model = peft.get_peft_model(self.model(), peft.LoraConfig(
            r=8, lora_alpha=16, target_modules=self.targets, task_type=None if task == "SEQ_CLS" else task)).train()
        with torch.no_grad():
            for name, module in model.named_modules():
                if hasattr(module, "lora_A") and len(module.lora_A):
                    site = name.removeprefix("base_model.model.")
                    module.lora_A["default"].weight.copy_(self.factors[f"{site}.lora_A"])
        if compiled:
            self.stack.enter_context(compiled_layers(model))
        return self._plain(model)

    def full(self) -> Step:
        return self._plain(self.model())

    def _plain(self, model: torch.nn.Module) -> Step:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0,
                                      fused=True)

        def step() -> float:
            loss = model(**self.batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.item()

        return step

    def floor(self) -> Step:
        model = self.model().requires_grad_(False)
        model.get_input_embeddings().register_forward_hook(lambda _, args, out: out.requires_grad_())

        def step() -> float:
            loss = model(**self.batch).loss
            loss.backward()
            return loss.item()

        return step


def flops(model: torch.nn.Module, tokens: int) -> float:
    """Multiplications and additions of a forward and backward pass through frozen matrices: 4 for each weight."""
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    return 4.0 * matrices * tokens


def main() -> int:
    """Time all sides, alternating."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 layers and no compiled sides")
    parser.add_argument("--dtype", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--shape", choices=["smollm2", "qwen", "bert"], default="smollm2")
    parser.add_argument("--qv", action="store_true", help="adapt q and v only")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--vs", default="peft", choices=["peft"])
    args = parser.parse_args()
    dtype, reason = choose_dtype(args.dtype, "cpu")
    print(f"{str(dtype)[6:]}: {reason}")
    layers = args.layers or (4 if args.quick else None)
    targets = BERT if args.shape == "bert" else LINEAR
    targets = [t for t in targets if t in ("q_proj", "v_proj", "query", "value")] if args.qv else targets
    with ExitStack() as stack:
        sides = Sides(args.shape, dtype, layers, targets, stack)
        steps = {"ours": sides.ours(compiled=False)}
        steps |= {"peft": sides.peft(compiled=False), "full": sides.full(), "floor": sides.floor()}
        if not args.quick:
            steps |= {"ours, compiled": sides.ours(compiled=True), "peft, compiled": sides.peft(compiled=True)}
        losses: dict[str, list[float]] = {name: [] for name in steps}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for taken in range(1 + args.repeats):
            for name, step in steps.items():
                began = time.perf_counter()
                losses[name].append(step())
                times[name].append(time.perf_counter() - began)
            print(f"  step {taken}: " + ", ".join(f"{name} {times[name][-1]:.2f} s" for name in steps), flush=True)
        for values in times.values():
            del values[0]  # first touches, and compiling
    t = {name: statistics.median(values) for name, values in times.items()}
    work = flops(sides.model(), sides.batch["input_ids"].numel())
    peak = gemm_rate(dtype)
    for name, value in t.items():
        print(f"  {name:15} {value:7.3f} s  {value / t['floor']:.2f} of the floor  {work / value / peak:5.1%} of "
              f"GEMM peak ({peak / 1e9:.0f} GFLOP/s)  losses {losses[name][0]:.5f} .. {losses[name][-1]:.5f}")
    near = 1e-4 if dtype == torch.float32 else 2e-2

    def same(a: str, b: str) -> bool:
        return all(abs(x - y) <= near * abs(y) for x, y in zip(losses[a], losses[b], strict=True))

    fp32 = dtype == torch.float32
    label = f"{args.shape}, {'q,v' if args.qv else 'all-linear'}, {str(dtype)[6:]}"
    eager_goal = 0.75 if args.qv else 0.90 if fp32 else 0.85
    cases = [Case(f"{label}: step / peft", "s", t["ours"], t["peft"], "peft", eager_goal, equal=same("ours", "peft")),
             Case(f"{label}: step / full fine-tuning", "s", t["ours"], t["full"], "full", 0.70)]
    if not args.quick:
        goal = 0.75 if args.qv else 0.90 if fp32 else 0.70
        cases += [Case(f"{label}: compiled / peft", "s", t["ours, compiled"], t["peft"], "peft", goal,
                       equal=same("ours, compiled", "peft")),
                  Case(f"{label}: compiled / peft compiled", "s", t["ours, compiled"], t["peft, compiled"],
                       "peft compiled", 1.0, equal=same("ours, compiled", "peft, compiled")),
                  Case(f"{label}: compiled / full fine-tuning", "s", t["ours, compiled"], t["full"], "full", 0.70)]
    return report("train_step", cases) and 0


if __name__ == "__main__":
    raise SystemExit(main())
