"""Regional `torch.compile`: each of a model's repeated layers by itself, so that one compilation serves them all.

What is gained are the many small passes over memory between matrix products. What it costs is a compilation, once for
each machine and shape of layer, so that a short run is better off without. Lengths are symbols: another batch is not
another compilation.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from deltaw.inject.blocks import repeated_layers

REPAID_AFTER, REPAID_AFTER_GPU = 900.0, 150.0
"""Seconds of training from which on compiling is tried. A processor saves about a tenth of the time for a minute of
compiling; a GPU, which in plain operations waits for their launches, a third and more for half a minute."""


@contextmanager
def compiled_layers(model: nn.Module, backend: str = "inductor") -> Iterator[int]:
    """The model with its repeated layers compiled for the length of the block; how many there are.

    Where a compilation fails later than at first, the layer runs as it is.
    """
    layers = repeated_layers(model)
    before = [layer.__dict__.get("_compiled_call_impl") for layer in layers]
    dynamo: Any = torch._dynamo.config
    try:
        # Every layer is an entry of its own in the compiler's table of one function.
        with dynamo.patch(suppress_errors=True, recompile_limit=max(64, 2 * len(layers))), \
                warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", message=".*lru_cache.*")
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
            for layer in layers:
                layer.compile(dynamic=True, backend=backend)
            yield len(layers)
    finally:
        for layer, call in zip(layers, before, strict=True):
            layer._compiled_call_impl = call


def why_not(device: torch.device) -> str:
    """Why this machine cannot compile, in a few words; "" where it can as far as is known."""
    if device.type == "cpu":
        from torch._inductor import cpp_builder

        try:
            cpp_builder.get_cpp_compiler()
        except Exception as error:  # whatever is wrong, it is a reason and not a failure
            return f"no C++ compiler was found ({type(error).__name__})"
        return ""
    from torch.utils._triton import has_triton

    return "" if has_triton() else "Triton is not installed"
