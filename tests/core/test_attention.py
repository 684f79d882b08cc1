"""Routing through `nn.MultiheadAttention` with everything that its forward takes along with a batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import deltaw
from deltaw import LoraConfig, Switchboard
from deltaw.errors import RoutingError
from tests.device import DEVICE, randn
from tests.laws.dense import error, fill

ROWS, LENGTH, WIDTH, HEADS = 3, 4, 8, 2
NAMES = ["b", None, "a"]


def attention(*, batch_first: bool) -> tuple[nn.MultiheadAttention, Switchboard]:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first).to(DEVICE).eval()
    board = deltaw.attach(model, LoraConfig(r=2, target_modules=["in_proj", "out_proj"]), "a")
    board.add("b", LoraConfig(r=1, target_modules=["in_proj"]))
    fill(board, "a", seed=3)
    fill(board, "b", seed=4)
    return model, board


MASKS: dict[str, dict[str, Tensor]] = {
    "none": {},
    "padding": {"key_padding_mask":
                torch.arange(LENGTH, device=DEVICE) >= torch.tensor([[4], [2], [3]], device=DEVICE)},
    "causal": {"attn_mask": torch.ones(LENGTH, LENGTH, device=DEVICE).triu(1).bool()},
    "own": {"attn_mask": randn(ROWS * HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(1))},
}


def of_row(mask: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """A mask's part for one row: of a 3-D one, all heads of it."""
    if "key_padding_mask" in mask:
        return {"key_padding_mask": mask["key_padding_mask"][row:row + 1]}
    if "attn_mask" in mask and mask["attn_mask"].dim() == 3:
        return {"attn_mask": mask["attn_mask"][row * HEADS:(row + 1) * HEADS]}
    return mask


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("averaged", [True, False, None])
def test_rows_with_masks_and_weights(mask: str, averaged: bool | None, batch_first: bool) -> None:
    model, board = attention(batch_first=batch_first)
    dim = 0 if batch_first else 1
    x = randn(ROWS, LENGTH, WIDTH).movedim(0, dim)
    options = {"need_weights": averaged is not None, "average_attn_weights": bool(averaged)}
    with board.route(NAMES):
        output, weights = model(x, x, value=x, **MASKS[mask], **options)
    assert (weights is None) is (averaged is None)
    for row, name in enumerate(NAMES):
        board.use(name)
        alone = x.select(dim, row).unsqueeze(dim)
        expected, expected_weights = model(alone, alone, alone, **of_row(MASKS[mask], row), **options)
        assert error(output.select(dim, row), expected.select(dim, 0)) < 1e-5
        if weights is not None:
            assert error(weights[row], expected_weights[0]) < 1e-5


def test_a_query_without_rows_is_refused() -> None:
    model, board = attention(batch_first=True)
    x = randn(LENGTH, WIDTH)
    assert model(x, x, x)[0].shape == (LENGTH, WIDTH)
    with board.route(NAMES), pytest.raises(RoutingError, match="three dimensions"):
        model(x, x, x)
