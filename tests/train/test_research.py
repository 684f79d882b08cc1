"""The workbench: each verb against plain torch, adapters apart from each other, state that comes back to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import deltaw
from deltaw.bases import Base
from deltaw.data import Example
from deltaw.errors import ConfigError, NonFiniteError
from deltaw.train import AdamParams, Workbench
from tests.train.conftest import character_tokenizer


def make_base(model: Any) -> Base:
    return Base(model=model, tokenizer=character_tokenizer(), source="tiny", kind="folder", folder=None,
                dtype=torch.float32, dtype_reason="")


def examples(seed: int, lengths: tuple[int, ...] = (7, 5)) -> list[Example]:
    draw = torch.Generator().manual_seed(seed)
    rows = [torch.randint(4, 60, (n,), generator=draw).tolist() for n in lengths]
    return [Example(row, [-100, -100, *row[2:]], "") for row in rows]


def plain_logprobs(model: Any, batch: list[Example]) -> list[Tensor]:
    """log p of the supervised tokens of each example, one forward each."""
    found = []
    for example in batch:
        logits = model(input_ids=torch.tensor([example.input_ids])).logits[0, 1:-1]
        found.append(-F.cross_entropy(logits, torch.tensor(example.input_ids[2:]), reduction="none"))
    return found


def clipped(logprobs: Any, batch: Any) -> Tensor:
    """Something that is not linear in the log-probabilities."""
    return torch.stack([part.exp().sum() ** 2 for part in logprobs]).sum()


@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_forward_backward_is_plain_autograd(kind: str, tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from deltaw.train import research

    if kind == "padded":
        monkeypatch.setattr(research, "takes_packed", lambda model: False)
    config = deltaw.LoraConfig(r=3, init_lora_weights=False)
    with Workbench(make_base(tiny_llama(vocab_size=99))) as bench:
        bench.add("x", config, seed=1)
        bench.add("y", deltaw.LoraConfig(r=5, target_modules=["v_proj"], init_lora_weights=False), seed=2)
        work = {"x": (examples(1), clipped), "y": (examples(2, (4, 9, 3)), clipped)}
        found = bench.forward_backward_many(work)
        ours = {n: {k: p.grad.clone() for k, p in bench.board.parameters(n).items() if p.grad is not None}
                for n in work}
        for name, (batch, _) in work.items():
            bench.board.use(name)
            parameters = bench.board.parameters(name)
            logprobs = plain_logprobs(bench.base.model, batch)
            value = clipped(logprobs, batch)
            expected = torch.autograd.grad(value, list(parameters.values()))
            assert found[name].loss == pytest.approx(value.item(), rel=1e-5)
            for a, b in zip(found[name].logprobs, logprobs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
            for (key, grad), want in zip(ours[name].items(), expected, strict=True):
                torch.testing.assert_close(grad, want, rtol=1e-3, atol=1e-5 * float(want.abs().max()), msg=key)


def test_optim_step_is_torchs_adamw_and_touches_one_adapter(tiny_llama: Any) -> None:
    with Workbench(make_base(tiny_llama(vocab_size=99))) as bench:
        for name in ("x", "y"):
            bench.add(name, deltaw.LoraConfig(r=3, init_lora_weights=False), seed=1)
        copies = {k: p.detach().clone().requires_grad_() for k, p in bench.board.parameters("x").items()}
        optimizer = torch.optim.AdamW(copies.values(), lr=3e-3, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
        before = {k: p.detach().clone() for k, p in bench.board.parameters("y").items()}
        for step in range(3):
            bench.forward_backward("x", examples(step))
            bench.forward_backward("x", examples(step + 10))  # gradients add up
            for key, parameter in bench.board.parameters("x").items():
                assert parameter.grad is not None
                copies[key].grad = parameter.grad.clone()
            bench.optim_step("x", AdamParams(learning_rate=3e-3, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1))
            optimizer.step()
        for key, parameter in bench.board.parameters("x").items():
            torch.testing.assert_close(parameter.detach(), copies[key].detach(), rtol=1e-5, atol=1e-7)
        assert all(torch.equal(p, before[k]) for k, p in bench.board.parameters("y").items())


def test_state_comes_back_to_the_bit(tiny_llama: Any, tmp_path: Path) -> None:
    def steps(bench: Workbench, seeds: range) -> None:
        for seed in seeds:
            bench.forward_backward("x", examples(seed))
            bench.optim_step("x", AdamParams(learning_rate=1e-2))

    def tensors(bench: Workbench) -> list[Tensor]:
        return [p.detach().clone() for p in bench.board.parameters("x").values()]

    config = deltaw.LoraConfig(r=3, lora_dropout=0.3)
    with Workbench(make_base(tiny_llama(vocab_size=99))) as bench:
        bench.add("x", config, seed=1)
        steps(bench, range(3))
        saved = bench.save_state("x", tmp_path / "state")
        assert saved.is_dir()
        steps(bench, range(3, 6))
        whole = tensors(bench)
    torch.manual_seed(99)
    with Workbench(make_base(tiny_llama(vocab_size=99))) as bench:
        bench.add("x", config, seed=5)
        with pytest.raises(ConfigError, match="holds no state"):
            bench.load_state("x", tmp_path / "nothing")
        bench.load_state("x", tmp_path / "state")
        steps(bench, range(3, 6))
        assert all(torch.equal(a, b) for a, b in zip(tensors(bench), whole, strict=True))


def test_sampling_follows_seed_adapter_and_temperature(tiny_llama: Any) -> None:
    with Workbench(make_base(tiny_llama(vocab_size=99, initializer_range=0.3))) as bench:
        bench.add("x", deltaw.LoraConfig(r=8, init_lora_weights=False, lora_alpha=200), seed=1)
        prompts = [[5, 6, 7], [8, 9]]
        outside = torch.get_rng_state()
        one, again, other = (bench.sample("x", prompts, num_samples=3, max_new_tokens=6, seed=s) for s in (1, 1, 2))
        assert torch.equal(torch.get_rng_state(), outside)
        assert one == again != other
        assert [len(several) for several in one] == [3, 3]
        greedy = bench.sample("x", prompts, max_new_tokens=6, temperature=0.0)
        assert greedy != bench.sample(None, prompts, max_new_tokens=6, temperature=0.0)
        bench.board.use("x")
        ids = list(prompts[1])
        for token in greedy[1][0]:
            assert int(bench.base.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)


def test_a_loss_that_is_not_finite_adds_nothing(tiny_llama: Any) -> None:
    with Workbench(make_base(tiny_llama(vocab_size=99))) as bench:
        with pytest.raises(ConfigError, match="has no adapter"):
            bench.forward_backward("x", examples(1))
        bench.add("x", deltaw.LoraConfig(r=3), seed=1)
        with pytest.raises(NonFiniteError, match=r"forward_backward\('x'\): the loss is nan"):
            bench.forward_backward("x", examples(1), lambda logprobs, batch: logprobs[0].sum() * float("nan"))
        assert all(p.grad is None for p in bench.board.parameters("x").values())
