"""The compiled attention against float64, over rows of their own and packed ones, in every layout that it takes."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from deltaw.bases import native_attention
from deltaw.bases.packed_attention import attend
from deltaw.core import compiled
from tests.bases.causal import check_that_nan_stays_with_its_example, made

LEAST = 0.003
"""Relative error that is no wonder in bfloat16, whose numbers have 8 bits."""

needs_kernel = pytest.mark.skipif(
    not native_attention.fits(*[torch.empty(1, 1, 1, 32, dtype=torch.bfloat16)] * 3),
    reason="the kernel wants AVX512-BF16 without AMX, and a C compiler")


def by_torch(inputs: list[torch.Tensor], lengths: list[int], scale: float) -> torch.Tensor:
    """(B, T, heads, D), example by example."""
    parts = zip(*(t.split(lengths, 2) for t in inputs), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*part, is_causal=True, scale=scale, enable_gqa=True)
                      for part in parts], 2).transpose(1, 2)


def errors(inputs: list[torch.Tensor], out: torch.Tensor, exact: Sequence[torch.Tensor]) -> list[float]:
    """Relative errors of the output and of each gradient, of a random g."""
    found = (out, *torch.autograd.grad(out, inputs, random_like(out)))
    return [float((a.detach().double() - b).norm() / b.norm().clamp_min(1e-9))
            for a, b in zip(found, exact, strict=True)]


def random_like(out: torch.Tensor) -> torch.Tensor:
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()


def is_as_near_as_torch(inputs: list[torch.Tensor], out: torch.Tensor, lengths: list[int], scale: float) -> bool:
    """Whether the output and each gradient are as near to those of float64 as what torch's kernel finds."""
    wide = [t.detach().double().requires_grad_() for t in inputs]
    true = by_torch(wide, lengths, scale)
    exact = [true.detach(), *torch.autograd.grad(true, wide, random_like(out).double())]
    mine, other = errors(inputs, out, exact), errors(inputs, by_torch(inputs, lengths, scale), exact)
    return all(a < max(1.2 * b, LEAST) for a, b in zip(mine, other, strict=True))


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2, 9])  # of few examples each head is a task, and heads' dk and dv are added up
@pytest.mark.parametrize(("batch", "tokens", "heads", "kv", "width"), [
    (2, 64, 4, 4, 32), (3, 150, 6, 2, 64), (1, 1, 2, 1, 64), (1, 65, 3, 1, 96), (2, 200, 2, 2, 128), (1, 7, 9, 3, 256)])
def test_rows_without_padding(batch: int, tokens: int, heads: int, kv: int, width: int, threads: int,
                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    inputs = made(batch, tokens, heads, kv, width, torch.bfloat16)
    out, _ = attend(torch.nn.Module(), *inputs, None, scaling=0.3)
    assert out.is_contiguous()
    assert is_as_near_as_torch(inputs, out, [tokens], 0.3)


@needs_kernel
@pytest.mark.parametrize("lengths", [[5] * 4, [70, 9, 66, 69], [3, 1, 200, 2], [100, 130, 100, 131, 20]], ids=str)
def test_packed_rows(lengths: list[int]) -> None:
    inputs = made(1, sum(lengths), 6, 2, 32, torch.bfloat16)
    places = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    out, _ = attend(torch.nn.Module(), *inputs, None, cu_seq_lens_q=places)
    assert is_as_near_as_torch(inputs, out, lengths, 32**-0.5)


@needs_kernel
def test_scores_far_apart_keep_their_order() -> None:
    inputs = made(1, 130, 2, 2, 32, torch.bfloat16)
    with torch.no_grad():
        inputs[0][:, :, 7] *= 300  # a softmax that is all but one-hot
        inputs[0][:, :, 70] = 0  # one that is even
        inputs[1][:, :, 100:] *= -80
    out, _ = attend(torch.nn.Module(), *inputs, None)
    assert is_as_near_as_torch(inputs, out, [130], 32**-0.5)


@needs_kernel
def test_a_result_is_the_same_each_time_and_by_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def results(threads: int) -> list[torch.Tensor]:
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        inputs = made(4, 100, 4, 4, 32, torch.bfloat16)
        out, _ = attend(torch.nn.Module(), *inputs, None)
        return [out, *torch.autograd.grad(out.float().square().sum(), inputs)]

    first = results(1)
    for threads in (1, 3):
        assert all(torch.equal(a, b) for a, b in zip(results(threads), first, strict=True))


@needs_kernel
def test_a_neighbour_that_is_not_a_number_changes_nothing() -> None:
    check_that_nan_stays_with_its_example(32)


@needs_kernel
def test_the_operation_is_sound_for_the_compiler() -> None:
    for places in (None, torch.tensor([0, 66, 150], dtype=torch.int32)):
        torch.library.opcheck(torch.ops.deltaw.packed_attention, (*made(1, 150, 4, 2, 32, torch.bfloat16), places, 0.5))


def test_what_the_kernel_is_not_for() -> None:
    q, k, v = made(1, 4, 2, 2, 32, torch.bfloat16)
    assert not native_attention.fits(q.float(), k.float(), v.float())
    assert not native_attention.fits(q[..., :16], k[..., :16], v[..., :16])
    assert not native_attention.fits(q, k, v[..., ::2])
    assert not native_attention.fits(*(t.to("meta") for t in (q, k, v)))


@pytest.mark.parametrize("how", ["no compiler", "a compiler that fails"])
def test_without_a_kernel_attention_goes_on(how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise subprocess.CalledProcessError(1, "cc")

    monkeypatch.setenv("DELTAW_HOME", str(tmp_path))
    if how == "no compiler":
        monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    else:
        monkeypatch.setattr(compiled.shutil, "which", lambda name: "/usr/bin/cc")
        monkeypatch.setattr(compiled.subprocess, "run", fail)
    native_attention.why_not.cache_clear()
    native_attention._library.cache_clear()
    try:
        assert native_attention.why_not() == {"no compiler": "there is no C compiler",
                                              "a compiler that fails": "cc made none (CalledProcessError)"}[how]
        inputs = made(1, 20, 4, 2, 32, torch.bfloat16)
        assert not native_attention.fits(*inputs)
        out, _ = attend(torch.nn.Module(), *inputs, None, cu_seq_lens_q=torch.tensor([0, 9, 20], dtype=torch.int32))
        assert is_as_near_as_torch(inputs, out, [9, 11], 32**-0.5)
    finally:
        native_attention.why_not.cache_clear()
        native_attention._library.cache_clear()
