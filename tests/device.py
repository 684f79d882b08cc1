"""Where the numeric tests compute: the CPU, or what DELTAW_TEST_DEVICE names (`cuda`, `cuda:1`).

Numbers are drawn on the CPU and then moved, so that a test sees the same ones on every device.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = torch.device(os.environ.get("DELTAW_TEST_DEVICE", "cpu"))
if DEVICE.type == "cuda" and DEVICE.index is None:
    DEVICE = torch.device(DEVICE.type, 0)  # as a tensor's own device says it: "cuda" is not equal to "cuda:0"

ON_CPU = DEVICE.type == "cpu"


def cpu_only(reason: str) -> pytest.MarkDecorator:
    """The mark of a test, or a module's `pytestmark`, of what there is on the CPU alone."""
    return pytest.mark.skipif(not ON_CPU, reason=f"on the CPU only: {reason}")


def randn(*shape: Any, requires_grad: bool = False, **options: Any) -> Tensor:
    """`torch.randn` on the CPU, moved to the device."""
    return torch.randn(*shape, **options).to(DEVICE).requires_grad_(requires_grad)


def randint(*arguments: Any, **options: Any) -> Tensor:
    """`torch.randint` on the CPU, moved to the device."""
    return torch.randint(*arguments, **options).to(DEVICE)
