"""Tables in 8 bits against dense float64 ones: rows, products, gradients, and what becomes of them when they move."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deltaw.core import packed as packing
from deltaw.core import stretches, tables
from deltaw.core.tables import PackedEmbedding, PackedHead, pack_rows, pack_table
from tests.device import DEVICE, randint, randn

V, I = 50, 24  # noqa: E741
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Relative to the largest number: rounding W and the result to the number format."""


@pytest.fixture(autouse=True)
def short_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of at most 16 rows: four of them."""
    for name in ("STRIP", "GPU_STRIP"):
        monkeypatch.setattr(stretches, name, 16 * I)
    monkeypatch.setattr(tables, "STRIP", 4 * 16 * I)


def table(dtype: torch.dtype, *, bias: bool = False, scale: float | None = None) -> tuple[Any, Any, Tensor]:
    """An embedding and an output layer tied to it, and what they hold as dense float64."""
    torch.manual_seed(0)
    W = torch.randn(V, I) * torch.rand(V, 1) * 3
    W[7] = 0
    weight = pack_table(W, (V, I), torch.device(DEVICE))
    head = nn.Linear(I, V, bias=bias).to(DEVICE, dtype).requires_grad_(False)
    dense = weight.data.double() * (weight.absmax.double() / 127).unsqueeze(1)
    return PackedEmbedding(nn.Embedding(V, I), weight, dtype, scale), PackedHead(head, weight, dtype), dense


def close(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    return float((got.detach().double() - wanted).abs().max()) <= TOLERANCE[dtype] * float(wanted.abs().max())


def test_rows_are_rounded_to_steps_of_their_largest_number() -> None:
    W = torch.randn(40, 33) * torch.logspace(-30, 30, 40).unsqueeze(1)
    W[3] = 0
    codes, absmax = pack_rows(W)
    assert torch.equal(absmax, W.abs().amax(1))
    step = absmax.double().unsqueeze(1) / 127
    assert float(((codes.double() * step - W.double()).abs() / step.clamp(min=1e-300)).max()) <= 0.5 + 1e-5
    assert not codes[3].any()
    in_strips = pack_table(W, (40, 33), torch.device("cpu"))
    assert torch.equal(in_strips, codes)
    assert torch.equal(in_strips.absmax, absmax)


def test_what_is_not_finite_stays_so() -> None:
    W = torch.ones(2, 4)
    W[1, 2] = float("nan")
    weight = pack_table(W, (2, 4), torch.device("cpu"))
    found = PackedEmbedding(nn.Embedding(2, 4), weight, torch.float32, None)(torch.tensor([0, 1]))
    assert found[0].isfinite().all()
    assert found[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_lookup_gives_the_rows_of_the_dense_table(dtype: torch.dtype) -> None:
    embedding, head, dense = table(dtype)
    ids = randint(0, V, (3, 5))
    rows = embedding(ids)
    assert rows.dtype == dtype
    assert rows.shape == (3, 5, I)
    assert close(rows, dense[ids], dtype)
    assert torch.equal(rows, head.packed.dense(dtype)[ids])
    scaled = table(dtype, scale=5.0)[0](ids)
    assert torch.equal(scaled, rows * 5)
    assert embedding(ids[:, :0]).shape == (3, 0, I)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_logits_and_their_gradient_are_those_of_the_dense_table(dtype: torch.dtype, bias: bool) -> None:
    _, head, dense = table(dtype, bias=bias)
    h = randn(2, 7, I).to(dtype).requires_grad_()
    logits, g = head(h), randn(2, 7, V).to(dtype)
    wanted = h.detach().double() @ dense.t() + (head.bias.double() if bias else 0)
    assert logits.dtype == dtype
    # codes times scales are rounded to float32 first
    assert close(logits, wanted, torch.float32 if dtype == torch.float64 else dtype)
    dh, = torch.autograd.grad(logits, h, g)
    assert close(dh, g.double() @ dense, torch.float32 if dtype == torch.float64 else dtype)
    assert head(h[:, :0]).shape == (2, 0, V)
    with torch.no_grad():
        assert torch.equal(head(h), logits)


def test_the_output_layer_is_never_unpacked_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    _, head, _ = table(torch.float32)
    sizes: list[int] = []
    take = packing.Workspace.take

    def watched(self: packing.Workspace, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        sizes.append(rows)
        return take(self, rows, columns, dtype)

    monkeypatch.setattr(packing.Workspace, "take", watched)
    monkeypatch.setattr(packing.Packed, "dense", lambda *_: pytest.fail("unpacked whole"))
    head(randn(3, I).requires_grad_()).sum().backward()
    if DEVICE == "cpu":
        assert sizes == 2 * [13, 13, 13, 11]


def test_codes_and_scales_stay_as_they_are_when_the_model_changes_its_format() -> None:
    embedding, head, _ = table(torch.float32, bias=True)
    model = nn.ModuleDict({"in": embedding, "out": head})
    before = embedding.weight.data.clone(), embedding.weight.absmax.clone()
    model.to(torch.bfloat16)
    assert head.bias.dtype == torch.bfloat16
    assert torch.equal(embedding.weight, before[0])
    assert torch.equal(embedding.weight.absmax, before[1])
    other = copy.deepcopy(model)
    assert other["in"].weight is other["out"].weight
    assert other["in"].weight is not embedding.weight
    assert torch.equal(other["in"].weight.absmax, before[1])
    assert torch.equal(other["in"](torch.arange(V, device=DEVICE)), embedding(torch.arange(V, device=DEVICE)))


def test_a_state_dict_holds_plain_numbers_and_is_packed_again_when_it_is_loaded() -> None:
    embedding, head, dense = table(torch.float32)
    model = nn.ModuleDict({"in": embedding, "out": head})
    state = model.state_dict()
    assert state["in.weight"].is_floating_point()
    assert state["in.weight"] is state["out.weight"]
    assert close(state["in.weight"], dense, torch.float32)
    twice = {name: 2 * tensor for name, tensor in state.items()}
    model.load_state_dict(twice)
    assert close(embedding(torch.arange(V, device=DEVICE)), 2 * dense, torch.float32)
    assert embedding.weight.dtype == torch.int8
