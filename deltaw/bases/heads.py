"""The head of a model: what stands on top of its base network and is new for a task."""

from __future__ import annotations

from typing import Any

from torch import nn


def head_modules(model: Any) -> tuple[str, ...]:
    """Dotted names of the modules outside `model.base_model` that hold parameters of their own.

    Found by structure and not by name: "score" in a Llama classifier, "classifier" in a BERT one. A language model's
    output layer counts only when it is not tied to the embedding. () for a model that is its own base.
    """
    base: nn.Module = model.base_model
    shared = {id(parameter) for parameter in base.parameters()}
    return tuple(_outside(model, base, shared, ""))


def _outside(module: nn.Module, base: nn.Module, shared: set[int], prefix: str) -> list[str]:
    found = []
    for name, child in module.named_children():
        if child is base:
            continue
        if any(part is base for part in child.modules()):
            found += _outside(child, base, shared, f"{prefix}{name}.")
        elif any(id(parameter) not in shared for parameter in child.parameters()):
            found.append(prefix + name)
    return found
