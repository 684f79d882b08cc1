"""How fast the kernels in C are that a step in bfloat16 runs on: frozen products, changes among them, codes, passes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from deltaw.bases import native_rows
from deltaw.bases.norms import Form
from deltaw.bases.packing import pack_4bit
from deltaw.core import native_low_rank
from deltaw.core.native_low_rank import NOTHING, Part, Segment, Target, packed
from deltaw.core.native_weight import FrozenLayer
from deltaw.core.packed import Packed

TOKENS = (1, 4, 16, 64, 256, 1024)
"""Tokens of the frozen products that are measured."""
RANKS = (1, 8, 16, 32, 64, 128, 256)
"""Ranks of the changes among them that are."""
_WIDE = 768
"""Inputs and outputs of the layer."""
_FEW = 64
"""Tokens of the product that codes are unpacked for: with more of them the difference is lost in what both take."""
_TURNS = 15
_LEAST_S = 1e-5
_PASS_BYTES = 10
"""A norm reads x and writes y, reads x and g and writes dx."""


def kernel_rates(seconds: Callable[[Callable[[], object]], float], *, unpacking: bool) -> Mapping[str, Any]:
    """`Rates` of the kernels by name, as `seconds` times a call; none where this machine has no kernels."""
    if not (native_low_rank.is_there() and native_rows.is_there()):
        return {}
    plain = _layer(TOKENS[-1])
    found = {"frozen": {tokens: 4.0 * tokens * _WIDE**2 / seconds(_layer(tokens)) for tokens in TOKENS},
             "narrow": {rank: 12.0 * TOKENS[-1] * rank * _WIDE / _seconds_more(_layer(TOKENS[-1], rank), plain)
                        for rank in RANKS},
             "passes": _passes(seconds)}
    if unpacking:
        x, W = torch.randn(_FEW, _WIDE).bfloat16(), torch.randn(4 * _WIDE, _WIDE)
        found["unpack"] = W.numel() / _seconds_more(_product(x, as_nf4(W)), _product(x, W.bfloat16()))
    return found


def as_nf4(W_OI: Tensor) -> Packed:
    """These numbers as a base packs them."""
    codes, state = pack_4bit(W_OI, "nf4", double_quant=True)
    return Packed("nf4", codes, (W_OI.shape[0], W_OI.shape[1]), state.absmax, state)


def _seconds_more(longer: Callable[[], object], shorter: Callable[[], object]) -> float:
    """What one takes more than the other, by turns: it is less than what a processor drifts by in a second."""
    took = []
    for _ in range(_TURNS):
        began = [time.perf_counter()]
        for run in (longer, shorter):
            run()
            began.append(time.perf_counter())
        took.append(began[1] - began[0] - (began[2] - began[1]))
    return max(statistics.median(took), _LEAST_S)


def _product(x: Tensor, W: Tensor | Packed) -> Callable[[], object]:
    y = x.new_empty(len(x), W.shape[0])
    return lambda: native_low_rank.forward(x, [y], NOTHING, [FrozenLayer(W)])


def _layer(tokens: int, rank: int = 0) -> Callable[[], object]:
    """Forward and backward of a layer, with a change of this rank if it is not 0."""
    x, W, g = (torch.randn(n, _WIDE).bfloat16() for n in (tokens, _WIDE, tokens))
    y, dx, layers = torch.empty_like(x), torch.empty_like(x), [FrozenLayer(W)]
    A, B = torch.randn(rank, _WIDE), torch.randn(_WIDE, rank)
    targets = [Target(torch.empty_like(A), torch.empty_like(B))]
    change = [Segment(0, tokens, [Part(0, A, B, 1.0)])]

    def run() -> None:
        h = native_low_rank.forward(x, [y], packed(change) if rank else NOTHING, layers)
        native_low_rank.backward(x, h, [g], dx, packed(change, targets) if rank else NOTHING, layers, onto_dx=False)

    return run


def _passes(seconds: Callable[[Callable[[], object]], float]) -> float:
    """Bytes a second that a norm moves, forward and backward."""
    x, g = (torch.randn(1024, _WIDE).bfloat16() for _ in range(2))
    w = torch.ones(_WIDE).bfloat16()

    def run() -> None:
        _, r = native_rows.norm(x, w, 1e-5, Form.NORMED_ROUNDED)
        native_rows.norm_backward(g, x, w, r, Form.NORMED_ROUNDED)

    return _PASS_BYTES * x.numel() / seconds(run)
