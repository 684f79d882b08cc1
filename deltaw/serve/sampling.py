"""From logits to tokens, one row at a time with its own generator: a seed means the same whatever else is running."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from deltaw.serve.request import Sequence, TokenLogprob

CANDIDATES = 1024
"""So many of the likeliest tokens are looked at before all are sorted."""


class Sampler:
    """Holds the generators of the sequences that draw."""

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self._seeds = generator or torch.Generator()
        if generator is None:
            self._seeds.seed()
        self._generators: dict[int, torch.Generator] = {}

    def forget(self, sequence: Sequence) -> None:
        """Drop a sequence's generator."""
        self._generators.pop(sequence.number, None)

    def choose(self, logits_BV: Tensor, sequences: Rows[Sequence]) -> list[tuple[int, TokenLogprob | None]]:
        """The next token of each sequence, with its log-probability where that was asked for."""
        likeliest = logits_BV.argmax(-1).tolist()
        return [(likeliest[i], None) if sequence.params.plain else self._choose_one(logits_BV[i].float(), sequence)
                for i, sequence in enumerate(sequences)]

    def _choose_one(self, logits_V: Tensor, sequence: Sequence) -> tuple[int, TokenLogprob | None]:
        params = sequence.params
        changed_V = penalized(logits_V, sequence)
        token = int(changed_V.argmax()) if params.greedy else self._draw(changed_V, sequence)
        return token, None if params.logprobs is None else told(logits_V, token, params.logprobs)

    def _draw(self, logits_V: Tensor, sequence: Sequence) -> int:
        params = sequence.params
        probs, tokens = candidates(logits_V / params.temperature, params.top_k, params.top_p, params.min_p)
        generator = self._generators.get(sequence.number)
        if generator is None:
            seed = params.seed
            if seed is None:
                seed = int(torch.randint(2**62, (), generator=self._seeds))
            generator = self._generators[sequence.number] = torch.Generator().manual_seed(seed)
        # Drawn by hand, and not with `multinomial`: one number a token, and rounding of other tokens does not matter.
        at = torch.rand((), generator=generator, dtype=torch.float64) * probs.double().sum().cpu()
        index = int(torch.searchsorted(probs.double().cumsum(0).cpu(), at, right=True))
        return int(tokens[min(index, len(tokens) - 1)])


def penalized(logits_V: Tensor, sequence: Sequence) -> Tensor:
    """The logits with the penalties for what was written, and for repetition of what was read too."""
    params = sequence.params
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted({*sequence.prompt, *sequence.written}), device=logits_V.device)
        there = logits_V[seen]
        factor = params.repetition_penalty
        logits_V = logits_V.index_put((seen,), torch.where(there > 0, there / factor, there * factor))
    if (params.presence_penalty or params.frequency_penalty) and sequence.written:
        times = Counter(sequence.written)
        written = torch.tensor(list(times), device=logits_V.device)
        change = [-params.presence_penalty - params.frequency_penalty * count for count in times.values()]
        logits_V = logits_V.index_add(0, written, logits_V.new_tensor(change))
    return logits_V


def candidates(logits_V: Tensor, top_k: int, top_p: float, min_p: float) -> tuple[Tensor, Tensor]:
    """Probabilities and tokens to draw among, the likeliest first: top-k, then top-p, then min-p, as in vLLM."""
    size = logits_V.shape[-1]
    count = min(top_k or size, size)
    first = min(count, CANDIDATES)
    log_total = torch.logsumexp(logits_V, -1)
    values, tokens = logits_V.topk(first)
    if top_k:
        log_total = torch.logsumexp(logits_V.topk(count).values if count > first else values, -1)
    probs = torch.exp(values - log_total)
    narrow = (top_p < 1 and float(probs.sum()) >= top_p) or (min_p > 0 and float(probs[-1]) < min_p * float(probs[0]))
    if count > first and not narrow:
        values, tokens = logits_V.topk(count)
        probs = torch.exp(values - log_total)
    keep = probs >= min_p * probs[0]
    if top_p < 1:
        keep &= probs.cumsum(0) - probs < top_p
    return probs[keep], tokens[keep]


def told(logits_V: Tensor, token: int, count: int) -> TokenLogprob:
    """The log-probability of a token and of the likeliest ones, of the model's own distribution."""
    logprobs_V = torch.log_softmax(logits_V, -1)
    top = logprobs_V.topk(count) if count else None
    alternatives = () if top is None else tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return TokenLogprob(token, float(logprobs_V[token]), alternatives)
