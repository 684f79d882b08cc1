"""The two research loops learn: DPO prefers what it was told to, a policy gradient raises its reward."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from deltaw.bases import Base, load_base


@pytest.fixture(autouse=True)
def examples_on_the_path(repo: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(repo / "examples"))
    yield
    for name in ("dpo", "policy_gradient"):
        sys.modules.pop(name, None)


@pytest.fixture
def base(tiny_llama: Any) -> Base:
    from tests.train.conftest import character_tokenizer

    tokenizer = character_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer), initializer_range=0.2)
    return Base(model=model, tokenizer=tokenizer, source="tiny", kind="folder", folder=None, dtype=torch.float32,
                dtype_reason="")


def test_dpo_learns_to_prefer(base: Base) -> None:
    import dpo

    history = dpo.learn(base, [("ab", "xy", "qr"), ("cd", "zx", "sq")], steps=25, rate=5e-3)
    for steps in history.values():
        assert steps[0][0] == pytest.approx(0.6931, abs=1e-3)  # -log σ(0): nothing is preferred at the start
        assert steps[-1][0] < 0.6 * steps[0][0]
        assert steps[-1][1] > 2.0


def test_a_policy_gradient_raises_its_reward(base: Base) -> None:
    import policy_gradient

    vowels = {4 + ord(c) - 32 for c in "aeiouAEIOU"} | {4 + i for i in range(20)}
    history = policy_gradient.learn(base, [[5, 6, 7]], lambda tokens: sum(t in vowels for t in tokens) / len(tokens),
                                    steps=30, samples=24, length=5, rate=2e-2)
    assert sum(history[-5:]) / 5 > sum(history[:5]) / 5 + 0.25


@pytest.mark.slow
def test_dpo_on_a_real_model(smollm2: Path) -> None:
    import dpo

    history = dpo.learn(load_base(str(smollm2), dtype="fp32"), dpo.PAIRS[:2], steps=6)
    for steps in history.values():
        assert steps[-1][0] < 0.5 * steps[0][0]
        assert steps[-1][1] > 2.0
