"""LoRA fine-tuning by hand: the whole method in one file of plain PyTorch, to be read from top to bottom.

    python examples/loop_by_hand.py FOLDER_OF_A_MODEL rows.jsonl --steps 100

where each row is {"prompt": ..., "completion": ...}. Nothing here comes from deltaw, and deltaw's own loop
(deltaw/train/loop.py) gives the same loss at every step: a test keeps it so.

The idea (Hu et al. 2021). A weight W of the network, O x I, is frozen. Beside it runs a change of low rank r:

    h = W x + (alpha / r) * B A x          A is r x I, B is O x r, and only these two are trained

B starts at zero, so that training starts from exactly the network that was given.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100  # the label of a token that is not learned from


# 1. The layer ---------------------------------------------------------------------------------------------------------


class LoRALinear(nn.Module):
    """A frozen linear layer and its low-rank change."""

    def __init__(self, frozen: nn.Linear, r: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        self.frozen, self.scale = frozen, alpha / r
        bound = frozen.in_features**-0.5  # A x then has about the size of x
        self.A = nn.Parameter(torch.empty(r, frozen.in_features).uniform_(-bound, bound, generator=generator))
        self.B = nn.Parameter(torch.zeros(frozen.out_features, r))

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.scale * (x @ self.A.T @ self.B.T)  # never B @ A: that would be O x I


def attach(model: nn.Module, r: int, alpha: float, seed: int) -> list[nn.Parameter]:
    """Freeze the model, put a LoRALinear in the place of every linear layer of its body, and return what is trained."""
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    body = model.base_model  # all but the output layer
    trained = []
    for name, layer in list(body.named_modules()):
        if isinstance(layer, nn.Linear):
            parent, _, child = name.rpartition(".")
            adapted = LoRALinear(layer, r, alpha, generator)
            setattr(body.get_submodule(parent), child, adapted)
            trained += [adapted.A, adapted.B]
    return trained


# 2. The data ----------------------------------------------------------------------------------------------------------


def encode(tokenizer: Any, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """Token ids, and labels: the completion's tokens and the end token are learned, the prompt's are not."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    before = tokenizer(prompt, add_special_tokens=not tokenizer.chat_template).input_ids
    answer = [*tokenizer(completion, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return before + answer, [IGNORED] * len(before) + answer


def collate(examples: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    """Rows of different lengths as one batch, filled up on the right. The mask tells what is real, not the pad id."""
    longest = max(len(ids) for ids, _ in examples)

    def padded(rows: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])

    return {"input_ids": padded([ids for ids, _ in examples], 0),
            "attention_mask": padded([[1] * len(ids) for ids, _ in examples], 0),
            "labels": padded([labels for _, labels in examples], IGNORED)}


def batches(examples: list[tuple[list[int], list[int]]], size: int, seed: int) -> Any:
    """Endless batches; every epoch has an order of its own, drawn from the seed and the epoch's number."""
    epoch = 0
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(len(examples))
        for start in range(0, len(order), size):
            yield collate([examples[i] for i in order[start:start + size]])
        epoch += 1


# 3. The loss ----------------------------------------------------------------------------------------------------------


def next_token_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The mean of -log p(token | tokens before it) over all learned tokens of the batch."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    predictions, targets = logits[:, :-1], batch["labels"][:, 1:]  # position t predicts token t + 1
    return F.cross_entropy(predictions.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)


# 4. The loop ----------------------------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Up from zero in `warmup` steps, then down to zero along a line."""
    return peak * (step / warmup if step < warmup else (steps - step) / max(1, steps - warmup))


def train(model: nn.Module, tokenizer: Any, rows: list[dict[str, str]], *, steps: int, batch_size: int = 8, r: int = 8,
          alpha: float = 16, peak: float = 5e-4, warmup: int = 0, max_grad_norm: float = 1.0,
          seed: int = 0) -> list[float]:
    """Fine-tune, and return the loss of each step."""
    trained = attach(model, r, alpha, seed)
    stream = batches([encode(tokenizer, row["prompt"], row["completion"]) for row in rows], batch_size, seed)
    optimizer = torch.optim.AdamW(trained, lr=peak, weight_decay=0.0)
    model.train()
    losses = []
    for step in range(steps):
        loss = next_token_loss(model, next(stream))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak, warmup)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# 5. The end -----------------------------------------------------------------------------------------------------------


def merge(model: nn.Module) -> None:
    """Add each change into its frozen weight, W + (alpha / r) * B A, and put the plain layers back."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, LoRALinear):
                with torch.no_grad():
                    layer.frozen.weight += layer.scale * (layer.B @ layer.A)
                setattr(parent, name, layer.frozen)


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description="Fine-tune a model with LoRA, by hand.")
    parser.add_argument("model", type=Path, help="a folder that transformers reads")
    parser.add_argument("data", type=Path, help="a JSON Lines file of prompt and completion")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps")
    parser.add_argument("--out", type=Path, help="where to save the merged model")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    rows = [json.loads(line) for line in options.data.read_text(encoding="utf-8").splitlines() if line.strip()]
    losses = train(model, tokenizer, rows, steps=options.steps)
    for step in range(0, len(losses), max(1, len(losses) // 20)):
        print(f"step {step + 1:5d}  loss {losses[step]:.4f}")
    print(f"step {len(losses):5d}  loss {losses[-1]:.4f}")
    if options.out:
        merge(model)
        model.save_pretrained(options.out)
        tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
