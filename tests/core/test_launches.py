"""How many small operations the fused layer takes: on a GPU each is a launch, and a small model waits for those."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deltaw.core import native_low_rank
from deltaw.core.frozen import Projection
from deltaw.core.kernels import low_rank_linear


class Operations(TorchDispatchMode):
    """Counts what is run under it, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _without_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this processor is quickest with."""
    monkeypatch.setattr(native_low_rank, "is_there", lambda: False)


def of_passes(scales: Sequence[float]) -> tuple[Counter[str], Counter[str]]:
    """What forward and backward run for projections with float32 factors over a bfloat16 input."""
    x = torch.randn(6, 64, dtype=torch.bfloat16, requires_grad=True)
    projections = [Projection(torch.randn(32, 64, dtype=torch.bfloat16), None, torch.randn(4, 64, requires_grad=True),
                              torch.randn(32, 4, requires_grad=True), scale) for scale in scales]
    with Operations() as forward:
        outputs = low_rank_linear(x, projections)
    gradients = [torch.ones_like(y) for y in outputs]
    with Operations() as backward:
        torch.autograd.backward(outputs, gradients)
    return forward.count, backward.count


def test_factors_are_converted_once_for_both_passes() -> None:
    forward, backward = of_passes([2.0, 2.0, 2.0])
    assert forward["_to_copy"] == 6  # each A and each B
    assert backward["_to_copy"] == 1 + 3  # the gradients back to float32: of all A, and of each B
    assert backward["cat"] == 1


def test_one_scale_of_all_projections_is_multiplied_once() -> None:
    assert of_passes([2.0, 2.0, 2.0])[1]["mul_"] == 1 + 3  # dH, and each dB
    assert of_passes([2.0, 1.0, 2.0])[1]["mul_"] == 3 + 3


def test_a_single_projection_has_nothing_to_join() -> None:
    forward, backward = of_passes([2.0])
    assert not forward["cat"]
    assert not backward["cat"]
