"""Bases whose packed layers cannot carry a low-rank change are unpacked while they are loaded.

GPTQ's and AWQ's layers hold codes that only their package's kernels read. A linear layer without its bias is its
matrix, and what it makes of the identity is that matrix, with the very numbers that it multiplies by: so no format has
to be known here. transformers itself unpacks compressed-tensors. The base then takes the memory of its number format.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.packed import holds_codes

_BY_TRANSFORMERS = ("compressed-tensors",)
_BY_IDENTITY = ("awq", "gptq")
UNPACKED = (*_BY_TRANSFORMERS, *_BY_IDENTITY)
"""Methods whose codes are gone once a base is loaded."""
_ROWS = 512
"""Rows of the identity at once."""


def ask_for_weights(config: Any, method: str | None) -> None:
    """Have transformers unpack while it loads, where it can."""
    if method in _BY_TRANSFORMERS:
        found = config.quantization_config
        values = dict(found) if isinstance(found, Mapping) else found.to_dict()
        config.quantization_config = {**values, "dequantize": True}


def unpack(model: Any, method: str | None, dtype: torch.dtype) -> None:
    """Put plain linear layers of this number format in the place of those that hold codes alone."""
    if method not in _BY_IDENTITY:
        return
    packed = {name: module for name, module in model.named_modules() if holds_codes(module)}
    for name, module in packed.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, _plain(module, dtype))
    model.hf_quantizer.remove_quantization_config(model)


@torch.no_grad()
def _plain(module: Any, dtype: torch.dtype) -> nn.Linear:
    bias: Tensor | None = getattr(module, "bias", None)
    device = next(module.buffers()).device
    plain = nn.Linear(module.in_features, module.out_features, bias=bias is not None, dtype=dtype, device=device)
    if bias is not None:
        plain.bias.copy_(bias)
        module.bias = None
    for start in range(0, module.in_features, _ROWS):
        stop = min(start + _ROWS, module.in_features)
        rows = torch.zeros(stop - start, module.in_features, dtype=dtype, device=device)
        rows[:, start:stop].fill_diagonal_(1)
        plain.weight[:, start:stop] = module(rows).t()
    return plain.requires_grad_(False)
