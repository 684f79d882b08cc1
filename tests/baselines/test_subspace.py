"""Fastfood against its matrix, and the two ways to use it against their definitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from deltaw.baselines import METHODS, BaselineConfig, fastfood
from deltaw.baselines.fastfood import Fastfood, walsh_hadamard
from deltaw.errors import ConfigError


def hadamard(n: int) -> torch.Tensor:
    from scipy.linalg import hadamard as dense

    return torch.tensor(dense(n), dtype=torch.float64)


def matrix(p: Fastfood, total: int) -> torch.Tensor:
    """P (rows, d) from the definition, with B, Π and G as they were drawn and its own normalisation."""
    H, blocks = hadamard(p.n), []
    for k in range(len(p.signs_KN)):
        permute = torch.eye(p.n, dtype=torch.float64)[p.order_KN[k].long()]
        gauss = p.gauss_KN[k].double()
        gauss = gauss / gauss.norm()  # up to the scale, which the definition fixes:
        blocks.append(H @ torch.diag(gauss) @ permute @ H @ torch.diag(p.signs_KN[k].double()) / p.n**0.5)
    return torch.cat(blocks)[:p.rows, :p.dimension] / (total / p.n) ** 0.5


@pytest.mark.parametrize("n", [1, 2, 8, 64, 128, 8192])
def test_the_transform_is_the_hadamard_matrix(n: int) -> None:
    x = torch.randn(3, n, dtype=torch.float64)
    expected = x @ hadamard(n) if n < 8192 else None
    if expected is not None:
        torch.testing.assert_close(walsh_hadamard(x), expected)
    torch.testing.assert_close(walsh_hadamard(walsh_hadamard(x)), x * n)


@pytest.mark.parametrize("at_once", [1, 1 << 20], ids=["a block at a time", "all blocks at once"])
@pytest.mark.parametrize(("dimension", "rows"), [(1, 5), (5, 3), (8, 40), (100, 1000)])
def test_fastfood_is_its_matrix(dimension: int, rows: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fastfood._AT_ONCE, "cpu", at_once)
    p = Fastfood(dimension, rows, total=rows, generator=torch.Generator().manual_seed(1), device=torch.device("cpu"))
    theta = torch.randn(dimension, dtype=torch.float64, requires_grad=True)
    P, weights = matrix(p, rows), torch.randn(rows, dtype=torch.float64)
    torch.testing.assert_close(p(theta), P @ theta, rtol=1e-5, atol=1e-6)  # G is kept in float32
    (p(theta) @ weights).backward()
    torch.testing.assert_close(theta.grad, P.T @ weights, rtol=1e-5, atol=1e-6)


def test_columns_have_length_one_and_are_nearly_orthogonal() -> None:
    p = Fastfood(60, 64 * 200, total=64 * 200, generator=torch.Generator().manual_seed(2), device=torch.device("cpu"))
    P = torch.stack([p(e) for e in torch.eye(60)], 1)
    gram = P.T @ P
    assert (gram.diagonal() - 1).abs().max() < 1e-4  # H keeps lengths exactly where all of its rows are there
    assert (gram - torch.diag(gram.diagonal())).abs().max() < 0.06  # 1/√12,800 would be one deviation: 0.009


@pytest.mark.parametrize("aware", [False, True], ids=["DID", "SAID"])
def test_weights_are_as_defined(aware: bool, tiny: Callable[..., Any]) -> None:
    model = tiny("gpt2")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    tuned = METHODS["subspace"](model, BaselineConfig(dimension=50, structure_aware=aware), 7)
    part = tuned.parts[0]
    values = tuned.parameters()
    layers = 4  # embeddings, two blocks, the last norm
    assert tuned.count() == 50
    assert {n: tuple(v.shape) for n, v in values.items()} == (
        {"subspace.theta": (46,), "subspace.scales": (4,)} if aware else {"subspace.theta": (50,)})
    torch.nn.init.normal_(values["subspace.theta"])
    if aware:
        torch.nn.init.normal_(values["subspace.scales"])
    total = sum(p.numel() for p in start.values())
    theta = values["subspace.theta"].detach().double()
    of = {"transformer.wte.weight": 2, "transformer.wpe.weight": 2, "transformer.h.0.mlp.c_fc.bias": 0,
          "transformer.h.1.attn.c_attn.weight": 1, "transformer.ln_f.weight": 3}
    assert part.layers == (layers if aware else 0)
    for name, layer in of.items():
        moved = (matrix(part.projections[name], total) @ theta).view(start[name].shape)
        scale = float(values["subspace.scales"][layer].detach()) if aware else 1.0
        module, _, leaf = name.rpartition(".")
        got = getattr(model.get_submodule(module), leaf)
        torch.testing.assert_close(got.double(), start[name].double() + scale * moved, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.lm_head.weight, model.transformer.wte.weight)


def test_a_dimension_has_to_leave_room_for_the_scales(tiny: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="more than 4, one for the scale of each layer"):
        METHODS["subspace"](tiny("gpt2"), BaselineConfig(dimension=4))
    assert METHODS["subspace"](tiny("gpt2"), BaselineConfig(dimension=4, structure_aware=False)).count() == 4


def test_a_classifiers_start_travels_with_the_values(tiny: Callable[..., Any], rows: dict[str, Any]) -> None:
    """Its head is drawn anew in each session: the values mean nothing without it."""
    tuned = METHODS["subspace"](tiny("bert"), BaselineConfig(dimension=50), 7)
    torch.nn.init.normal_(tuned.parameters()["subspace.theta"])
    expected = tuned.model(**rows).logits
    other = tiny("bert")
    torch.nn.init.normal_(other.classifier.weight)
    drawn = other.classifier.weight.detach().clone()
    again = METHODS["subspace"](other, BaselineConfig(dimension=50), 7)
    again.put(tuned.values())
    assert torch.equal(other(**rows).logits, expected)
    again.remove()
    assert torch.equal(other.classifier.weight, drawn)
