"""Beam search against looking at every answer, and the rule against repeats against one written here."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from deltaw.errors import ConfigError
from deltaw.train.beams import Beams
from deltaw.train.decoding import generate

NO_END = SimpleNamespace(eos_token_id=None, pad_token_id=0, all_special_ids=[])
PROMPTS = [[5, 9, 11], [7, 8], [3, 4, 5, 6, 20]]


@pytest.fixture
def model(tiny_llama: Callable[..., Any]) -> Any:
    """A model without an end token, whose next token is far from certain."""
    made = tiny_llama(eos_token_id=None, vocab_size=24)
    made.generation_config.eos_token_id = None
    with torch.no_grad():
        made.lm_head.weight.mul_(30)
    return made


def log_probs(model: Any, tokens: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0, -1].double().log_softmax(-1)


def test_as_many_beams_as_tokens_find_the_likeliest_answer(model: Any) -> None:
    found = generate(model, NO_END, PROMPTS, max_new_tokens=2, beams=Beams(num_beams=24))
    for prompt, answer in zip(PROMPTS, found, strict=True):
        first = log_probs(model, prompt)
        both = torch.stack([first[t] + log_probs(model, [*prompt, t]) for t in range(24)])
        assert answer == list(divmod(int(both.argmax()), 24))
    assert found != generate(model, NO_END, PROMPTS, max_new_tokens=2)  # else the test could not fail


def test_a_batch_is_answered_as_each_alone(model: Any) -> None:
    beams = Beams(num_beams=3, no_repeat_ngram_size=2)
    together = generate(model, NO_END, PROMPTS, max_new_tokens=6, beams=beams)
    assert together == [generate(model, NO_END, [p], max_new_tokens=6, beams=beams)[0] for p in PROMPTS]


def test_no_run_is_repeated_but_the_prompts(model: Any) -> None:
    (found,) = generate(model, NO_END, [PROMPTS[1] * 4], max_new_tokens=30, beams=Beams(no_repeat_ngram_size=2))
    tokens: list[int] = []
    for _ in range(30):
        scores = log_probs(model, [*PROMPTS[1] * 4, *tokens])
        seen = set(pairwise(tokens))
        for token in range(24):
            if tokens and (tokens[-1], token) in seen:
                scores[token] = -torch.inf
        tokens.append(int(scores.argmax()))
    assert found == tokens
    assert found != generate(model, NO_END, [PROMPTS[1] * 4], max_new_tokens=30)[0]


def test_options_that_make_no_sense_are_refused_together() -> None:
    with pytest.raises(ConfigError) as caught:
        Beams(num_beams=0, no_repeat_ngram_size=-1)
    assert len(caught.value.faults) == 2
    with pytest.raises(ConfigError, match="chooses among beams"):
        Beams(length_penalty=0.9)
