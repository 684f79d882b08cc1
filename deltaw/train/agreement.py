"""When two ways of computing a loss count as the same.

What tells is the format of the base, in which the activations are rounded, and not that of the loss, which is always
float32 or wider. The same sums in another order, as products of more rows may take them, leave a loss of SmolLM2 as it
is to 1e-6 in float32 and to 2e-3 in bfloat16; what is wrong, tokens that see another example say, moves it by far more.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
"""How far two losses may be apart, as a share of them, by the format of the base."""
NARROW = 3e-2
"""The same for formats of 16 bits: eight roundings of bfloat16 (2⁻⁸), since few tokens average little out."""


def same_loss(one: Tensor, other: Tensor, base: torch.dtype) -> bool:
    """Whether two summed losses of a base in this format are one; no NaN is."""
    return abs(float(one - other)) <= TOLERANCES.get(base, NARROW) * max(1.0, abs(float(other)))
