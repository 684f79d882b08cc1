"""Answers of a causal language model: greedy or beam-searched text, and the log-likelihood of given ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.bases import stop_tokens
from deltaw.bases.load import taken_positions
from deltaw.bases.quiet import quiet_transformers
from deltaw.train.beams import Beams
from deltaw.train.objective import IGNORED, CausalLoss


def generate(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int = 64,
             batch_size: int = 8, stop: Iterable[int] = (), beams: Beams | None = None) -> list[list[int]]:
    """The tokens that follow each prompt when the likeliest is taken each time, up to and without a stop token.

    With `beams` the likeliest answer that beam search finds. Batches are padded on the left and share a key-value
    cache. `stop` adds to the stop tokens of model and tokenizer. An answer ends early where the model has no positions
    left.
    """
    ends = sorted({*stop, *stop_tokens(model, tokenizer, ())})
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        rows = order[start:start + batch_size]
        longest = max(len(prompts[i]) for i in rows)
        room = min(max_new_tokens, _positions(model) - longest)
        if room < 1:
            continue
        written = _continue(model, tokenizer, [prompts[i] for i in rows], longest, room, ends, beams or Beams())
        for i, tokens in zip(rows, written, strict=True):
            cut = next((at for at, token in enumerate(tokens) if token in ends), len(tokens))
            answers[i] = tokens[:cut]
    return answers


def sample(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, num_samples: int,
           temperature: float, seed: int) -> list[list[list[int]]]:
    """`num_samples` continuations of each prompt, drawn at this temperature (0 is greedy), up to and with a stop token.

    The caller's random generators are as before afterwards.
    """
    ends = sorted(stop_tokens(model, tokenizer, ()))
    longest = max(map(len, prompts))
    rows = [prompt for prompt in prompts for _ in range(num_samples)]
    room = min(max_new_tokens, _positions(model) - longest)
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            written = _continue(model, tokenizer, rows, longest, room, ends, Beams(), temperature=temperature)
    finally:
        model.train(was_training)
    cut = [tokens[:next((at + 1 for at, token in enumerate(tokens) if token in ends), len(tokens))]
           for tokens in written]
    return [cut[i:i + num_samples] for i in range(0, len(cut), num_samples)]


def score_choices(model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]],
                  choices: Sequence[Sequence[int]], *, batch_size: int = 8) -> Tensor:
    """Σ log p(token | prompt, tokens before it) over each choice's tokens after each prompt; (prompts, choices)."""
    objective, device = CausalLoss(), device_of(model)
    pairs = sorted(((p, c) for p in range(len(prompts)) for c in range(len(choices))),
                   key=lambda pair: len(prompts[pair[0]]) + len(choices[pair[1]]))
    scores = torch.zeros(len(prompts), len(choices), dtype=torch.float64)
    for start in range(0, len(pairs), batch_size):
        part = pairs[start:start + batch_size]
        rows = [[*prompts[p], *choices[c]] for p, c in part]
        longest = max(map(len, rows))
        labels = [[IGNORED] * len(prompts[p]) + list(choices[c]) + [IGNORED] * (longest - len(row))
                  for (p, c), row in zip(part, rows, strict=True)]
        pad = tokenizer.pad_token_id or 0
        batch = {"input_ids": torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=device),
                 "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows],
                                                device=device),
                 "labels": torch.tensor(labels, device=device)}
        with torch.no_grad():
            logits_NV, targets_N = objective.supervised_logits(model, batch)
            losses_N = F.cross_entropy(logits_NV.float(), targets_N, reduction="none").double().cpu()
        of_row = (batch["labels"][:, 1:] != IGNORED).nonzero()[:, 0].cpu()
        sums = torch.zeros(len(part), dtype=torch.float64).index_add(0, of_row, -losses_N)
        for (p, c), score in zip(part, sums, strict=True):
            scores[p, c] = score
    return scores


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of these tokens, without special ones."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first parameter, where its inputs belong."""
    return next(model.parameters()).device


def finish(device: torch.device) -> None:
    """Wait until a GPU has done what it was given, so that a clock tells how long that took."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _continue(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], longest: int, room: int,
              ends: Sequence[int], beams: Beams, *, temperature: float = 0.0) -> list[list[int]]:
    from transformers import GenerationConfig

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    device = device_of(model)
    # Named one by one: what is left out would be taken from the base's own generation_config.json.
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else \
        {"do_sample": False, "temperature": 1.0, "top_k": 50}
    how = GenerationConfig(max_new_tokens=room, eos_token_id=list(ends) or None, pad_token_id=pad, top_p=1.0,
                           repetition_penalty=1.0, use_cache=True, num_beams=beams.num_beams,
                           length_penalty=beams.length_penalty, **drawn)
    with torch.no_grad(), quiet_transformers():
        output = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=how,
                                logits_processor=no_repeats(beams.no_repeat_ngram_size, longest))
    written: list[list[int]] = output[:, longest:].tolist()
    return written


def no_repeats(size: int, prompt_length: int) -> Any:
    """transformers' rule against repeated n-grams, for the answer alone: an answer may repeat its prompt's names."""
    from transformers import LogitsProcessorList, NoRepeatNGramLogitsProcessor

    class OfAnswer(NoRepeatNGramLogitsProcessor):  # type: ignore[misc]  # transformers is not followed by the checker
        """Looks at what follows the prompt only."""

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            """The scores, without what would repeat."""
            ruled: Tensor = super().__call__(input_ids[:, prompt_length:], scores)
            return ruled

    return LogitsProcessorList([OfAnswer(size)] if size else [])


def _positions(model: Any) -> int:
    """The longest sequence that the model's position table holds; a large number where it has none."""
    stated = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(stated or 1 << 30) - taken_positions(model)
