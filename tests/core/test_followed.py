"""Kernels that are followed on tensors without values: they tell what they would compute, and compute nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltaw.bases import native_rows
from deltaw.core import native_low_rank
from deltaw.core.followed import Shape, followed
from deltaw.core.frozen import Projection
from deltaw.core.kernels import low_rank_linear

HALF = torch.bfloat16


class Heard:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.frozen: list[Shape] = []
        self.narrow: list[Shape] = []
        self.moved: list[int] = []

    def hear_products(self, frozen: Sequence[Shape], narrow: Sequence[Shape]) -> None:
        self.frozen += frozen
        self.narrow += narrow

    def hear_pass(self, moved: int) -> None:
        self.moved.append(moved)


def empty(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_a_layer_tells_each_product_of_its_equations() -> None:
    """y = x Wᵀ + h Bᵀ with h = x Aᵀ; dx = g W + dh A with dh = g B, dA = dhᵀ x, dB = gᵀ h."""
    tokens, inputs, heard = 5, 64, Heard()
    x = empty(tokens, inputs).requires_grad_()
    sizes = [(96, 4), (32, 3)]
    layers = [Projection(empty(out, inputs), None, empty(rank, inputs, dtype=torch.float32).requires_grad_(),
                         empty(out, rank, dtype=torch.float32).requires_grad_(), 1.0) for out, rank in sizes]
    with followed(heard):
        outputs = low_rank_linear(x, layers)
        frozen, narrow = heard.frozen.copy(), heard.narrow.copy()
        torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])
    assert [tuple(y.shape) for y in outputs] == [(tokens, out) for out, _ in sizes]
    assert frozen == [(tokens, out, inputs) for out, _ in sizes]
    assert heard.frozen[len(frozen):] == [(tokens, inputs, out) for out, _ in sizes]
    assert narrow == [shape for out, rank in sizes for shape in ((tokens, rank, inputs), (tokens, out, rank))]
    assert heard.narrow[len(narrow):] == [shape for out, rank in sizes for shape in (
        (tokens, rank, out), (out, rank, tokens), (rank, inputs, tokens), (tokens, inputs, rank))]


def test_an_input_without_a_gradient_costs_none() -> None:
    heard = Heard()
    A, B = empty(4, 64, dtype=torch.float32).requires_grad_(), empty(32, 4, dtype=torch.float32).requires_grad_()
    with followed(heard):
        y, = low_rank_linear(empty(5, 64), [Projection(empty(32, 64), None, A, B, 1.0)])
        y.backward(torch.empty_like(y))
    assert heard.frozen == [(5, 32, 64)]
    assert heard.narrow == [(5, 4, 64), (5, 32, 4), (5, 4, 32), (32, 4, 5), (4, 64, 5)]
    assert A.grad is not None
    assert A.grad.is_meta


def test_passes_tell_the_bytes_that_they_read_and_write() -> None:
    heard, x = Heard(), empty(7, 64)
    with followed(heard):
        assert native_rows.fit(x)
        native_rows.norm(x, empty(64), 1e-5, 0)
        native_rows.gate(x, x)
        native_rows.gate_backward(x, x, x)
        native_rows.rotated(empty(1, 2, 7, 64), empty(1, 7, 64), empty(1, 7, 64))
    assert heard.moved == [2 * 7 * 64 * n for n in (2, 3, 5, 4)]


def test_tensors_without_values_are_taken_in_the_block_alone() -> None:
    assert not native_low_rank.takes(empty(5, 64))
    with followed(Heard()):
        assert native_low_rank.takes(empty(5, 64))
        assert not native_low_rank.takes(empty(5, 64, dtype=torch.float32))
    assert not native_low_rank.takes(empty(5, 64))


def test_what_has_values_is_computed_while_somebody_listens() -> None:
    """Another thread may train while a step is followed."""
    heard, x = Heard(), torch.ones(5, 64, dtype=HALF)
    A, B = torch.ones(2, 64).requires_grad_(), torch.ones(32, 2).requires_grad_()
    with followed(heard):
        y, = low_rank_linear(x, [Projection(torch.ones(32, 64, dtype=HALF), None, A, B, 1.0)])
        y.sum().backward()
    assert torch.equal(y, torch.full((5, 32), 64.0 + 128.0, dtype=HALF))
    assert A.grad is not None
    assert torch.equal(A.grad, torch.full((2, 64), 5.0 * 32))
    assert not heard.frozen
    assert not heard.narrow
