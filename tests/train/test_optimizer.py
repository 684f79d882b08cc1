"""Schedules against transformers', AdamW against its formula."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from deltaw.errors import MissingDependencyError
from deltaw.train.optimizer import adamw, schedule, set_rate, take_step, warmup_of
from tests.device import DEVICE, randn


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("total", "warmup"), [(10, 0), (10, 3), (7, 7), (1, 0), (50, 2)])
def test_schedules_are_those_of_transformers(kind: str, total: int, warmup: int) -> None:
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "constant_with_warmup" if kind == "constant" else kind
    reference = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    ours = schedule(kind, total=total, warmup=warmup)  # type: ignore[arg-type]
    for step in range(total):
        assert ours(step) == pytest.approx(reference.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        reference.step()


def test_adamw_is_the_formula_and_spares_vectors() -> None:
    matrix, vector = (nn.Parameter(torch.ones(shape, device=DEVICE)) for shape in ((2, 2), (2,)))
    optimizer = adamw({"w": matrix, "b": vector}, learning_rate=0.1, weight_decay=0.5, betas=(0.8, 0.9), eps=1e-3)
    expected = {"w": (1.0, 0.0, 0.0), "b": (1.0, 0.0, 0.0)}
    for step, gradient in enumerate((1.0, -2.0, 0.5), start=1):
        set_rate(optimizer, 0.1 / step)
        for name, (theta, m, v) in expected.items():
            decay = 0.5 if name == "w" else 0.0
            m, v = 0.8 * m + 0.2 * gradient, 0.9 * v + 0.1 * gradient**2
            m_hat, v_hat = m / (1 - 0.8**step), v / (1 - 0.9**step)
            theta = theta - 0.1 / step * decay * theta - 0.1 / step * m_hat / (v_hat**0.5 + 1e-3)
            expected[name] = (theta, m, v)
        matrix.grad, vector.grad = torch.full_like(matrix, gradient), torch.full_like(vector, gradient)
        optimizer.step()
    torch.testing.assert_close(matrix.detach(), torch.full_like(matrix, expected["w"][0]))
    torch.testing.assert_close(vector.detach(), torch.full_like(vector, expected["b"][0]))


def test_8_bits_without_their_package_are_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingDependencyError, match=r"bitsandbytes is not installed.*pip install 'deltaw\[quant\]'"):
        adamw({"w": nn.Parameter(torch.ones(2, 2))}, learning_rate=0.1, bits=8)


def test_warmup_is_counted_as_transformers_does() -> None:
    assert warmup_of(100, ratio=0.03, steps=None) == 3
    assert warmup_of(10, ratio=0.03, steps=None) == 1
    assert warmup_of(10, ratio=0.0, steps=None) == 0
    assert warmup_of(10, ratio=0.5, steps=2) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("longest", [0.0, 0.5, 1e6])
def test_a_step_cuts_gradients_as_torch_does(longest: float, dtype: torch.dtype) -> None:
    mine, its = ([nn.Parameter(torch.ones(shape, device=DEVICE, dtype=dtype)) for shape in ((7, 9), (5,))]
                 for _ in range(2))
    optimizer = adamw(dict(zip("wb", mine, strict=True)), learning_rate=0.1, weight_decay=0.1)
    reference = torch.optim.AdamW([{"params": its[:1], "weight_decay": 0.1}, {"params": its[1:], "weight_decay": 0.0}],
                                  lr=0.1, fused=True)
    for size in (10.0, 0.01, 1.0):  # AdamW forgets one factor of all steps, so that steps are of unlike size
        for p, q in zip(mine, its, strict=True):
            p.grad = randn(*p.shape).to(dtype) * size
            q.grad = p.grad.clone()
        take_step(optimizer, 0.1, norm=torch.nn.utils.get_total_norm([p.grad for p in mine if p.grad is not None]),
                  longest=longest)
        torch.nn.utils.clip_grad_norm_(its, longest or float("inf"))
        reference.step()
    assert all(p.grad is None for p in mine)
    for p, q in zip(mine, its, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6 if dtype == torch.float32 else 0.02, atol=1e-6)


def test_loraplus_gives_b_a_rate_of_its_own() -> None:
    A, B, other = (torch.nn.Parameter(torch.ones(2, 2, device=DEVICE)) for _ in range(3))
    optimizer = adamw({"x.lora_A": A, "x.lora_B": B, "x": other}, learning_rate=0.1, ratio_of_B=4.0)
    set_rate(optimizer, 0.01)
    for parameter in (A, B, other):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.allclose(1 - A, torch.full_like(A, 0.01), atol=1e-5)
    assert torch.equal(A, other)
    assert torch.allclose(1 - B, torch.full_like(B, 0.04), atol=1e-5)


def test_eight_bit_state_follows_full_state() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    start, target = randn(64, 128), randn(64, 128)
    ends = []
    for bits in (32, 8):
        p = torch.nn.Parameter(start.clone())
        optimizer = adamw({"w": p}, learning_rate=0.05, bits=bits)  # type: ignore[arg-type]
        for _ in range(300):
            (p - target).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(p.detach())
        sizes = {k: v.dtype for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor) and v.numel() > 4096}
        assert set(sizes.values()) == ({torch.float32} if bits == 32 else {torch.uint8})
    assert isinstance(optimizer, bitsandbytes.optim.AdamW8bit)
    assert float((ends[0] - target).abs().max()) < 0.3
    assert float((ends[1] - target).abs().max()) < 0.6
