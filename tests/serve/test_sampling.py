"""The sampler by its effect: which tokens are left, with which probability, against the definition written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltaw.serve.request import BASE, SamplingParams, Sequence
from deltaw.serve.sampling import CANDIDATES, Sampler, candidates

OPTIONS = st.tuples(st.integers(5, 2 * CANDIDATES), st.floats(0.05, 5), st.sampled_from([0, 1, 3, 40, 1500, 9999]),
                    st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01]), st.sampled_from([0.0, 0.001, 0.1, 1.0]),
                    st.integers(0, 10**6))


def by_definition(logits_V: Tensor, top_k: int, top_p: float, min_p: float) -> dict[int, float]:
    """Probabilities of the tokens that are left: the likeliest k, of those the likeliest that together reach p."""
    ranked = sorted(range(len(logits_V)), key=lambda token: -float(logits_V[token]))[:top_k or None]
    weights = [math.exp(float(logits_V[token]) - float(logits_V[ranked[0]])) for token in ranked]
    left, reached = {}, 0.0
    for token, weight in zip(ranked, weights, strict=True):
        if reached >= top_p * sum(weights) and top_p < 1:
            break
        reached += weight
        if weight >= min_p:
            left[token] = weight / sum(weights)
    return left


@settings(max_examples=120, deadline=None)
@given(OPTIONS)
def test_what_is_left_is_what_the_definition_leaves(options: tuple[int, float, int, float, float, int]) -> None:
    size, spread, top_k, top_p, min_p, seed = options
    logits_V = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread
    probs, tokens = candidates(logits_V, top_k, top_p, min_p)
    expected = by_definition(logits_V, top_k, top_p, min_p)
    assert tokens.tolist() == list(expected)
    assert probs.tolist() == pytest.approx(list(expected.values()), rel=1e-6)


def sequence(written: tuple[int, ...] = (), prompt: tuple[int, ...] = (0,), **params: Any) -> Sequence:
    made = Sequence(1, prompt, BASE, SamplingParams(**params), lambda event: None)
    made.written += written
    return made


def drawn(logits: list[float], times: int = 1000, **params: Any) -> dict[int, float]:
    """How often each token is drawn."""
    asked, sampler = sequence(seed=5, **params), Sampler()
    found = [sampler.choose(torch.tensor([logits]), [asked])[0][0] for _ in range(times)]
    return {token: found.count(token) / times for token in sorted(set(found))}


@pytest.mark.parametrize(("params", "expected"), [
    ({}, {0: 0.5, 1: 0.25, 2: 0.15, 3: 0.1}), ({"top_k": 2}, {0: 2 / 3, 1: 1 / 3}), ({"top_k": 1}, {0: 1.0}),
    ({"top_p": 0.7}, {0: 2 / 3, 1: 1 / 3}), ({"top_p": 0.4}, {0: 1.0}), ({"min_p": 0.4}, {0: 2 / 3, 1: 1 / 3}),
    ({"min_p": 0.25, "top_k": 3}, {0: 5 / 9, 1: 2.5 / 9, 2: 1.5 / 9}),
    ({"temperature": 0.5}, {0: 0.7246, 1: 0.1812, 2: 0.0652, 3: 0.029})])
def test_tokens_are_drawn_as_often_as_they_are_likely(params: dict[str, Any], expected: dict[int, float]) -> None:
    got = drawn([math.log(p) for p in (0.5, 0.25, 0.15, 0.1)], **params)
    assert got == pytest.approx(expected, abs=0.06)  # four deviations of 1000 draws


def greedy(logits: list[float], **params: Any) -> int:
    return Sampler().choose(torch.tensor([logits]), [sequence(temperature=0, **params)])[0][0]


def test_repetition_is_penalized_in_prompt_and_answer_and_whatever_the_sign() -> None:
    """CTRL (arXiv 1909.05858), equation 2, as transformers has it: above 0 divided, below 0 multiplied."""
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.tensor([3.0, 2.9, 1.0, -1.0, -2.0])
    changed = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([[0, 3]]), logits[None])[0]
    assert greedy(logits.tolist()) == 0
    assert greedy(logits.tolist(), prompt=(0, 3), repetition_penalty=1.3) == int(changed.argmax()) == 1
    assert greedy(logits.tolist(), prompt=(4,), written=(0,), repetition_penalty=1.3) == 1
    below = torch.tensor([-1.0, -1.1, -9.0])
    changed = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([[0]]), below[None])[0]
    assert greedy(below.tolist(), repetition_penalty=1.3) == int(changed.argmax()) == 1
    assert greedy([1.0, 1.2], prompt=(0,), repetition_penalty=0.5) == 0


def test_presence_counts_once_and_frequency_as_often_as_written() -> None:
    assert greedy([1.0, 0.6], prompt=(0,), presence_penalty=0.5) == 0, "the prompt does not count"
    assert greedy([1.0, 0.6], written=(0,), presence_penalty=0.5) == 1
    assert greedy([2.0, 0.6], written=(0, 0, 0), presence_penalty=0.5) == 0
    assert greedy([2.0, 0.6], written=(0, 0, 0), frequency_penalty=0.5) == 1
    assert greedy([2.0, 0.6], written=(0, 0), frequency_penalty=0.5) == 0
    assert greedy([1.0, 0.6], written=(1,), presence_penalty=-0.5) == 1
