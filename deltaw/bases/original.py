"""The weights of a base as they were before it was packed, one at a time and only those that are asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from deltaw.bases.sources import find_base
from deltaw.errors import BaseModelError, Fault

Originals = Callable[[str, tuple[int, ...]], Tensor | None]
"""Gives the weight of a name and shape in memory, or None."""
Source = str | Path | Mapping[str, Tensor]
"""Where original weights are: a model folder, a Hub id, or a state dict."""
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def open_originals(source: Source) -> Originals:
    """The original weights in a model folder (or of a Hub id), or in a state dict.

    Names in the folder may lack the prefix that they have in memory, or have one more. Raises BaseModelError for a
    folder without plain safetensors.
    """
    if isinstance(source, Mapping):
        return _from(source.__getitem__, list(source))
    place = find_base(str(source))
    if place.gguf is not None:
        raise BaseModelError(Fault(f"original '{source}'", "is a GGUF file", "a folder of safetensors"))
    files = _files(place.folder)

    def read(name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(files[name], framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor

    return _from(read, list(files))


def _files(folder: Path) -> dict[str, Path]:
    from safetensors import safe_open

    if (folder / _INDEX).is_file():
        names = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in names.items()}
    if not (folder / _SINGLE).is_file():
        raise BaseModelError(Fault(f"original '{folder}'", f"has neither {_SINGLE} nor {_INDEX}", "one of them"))
    with safe_open(folder / _SINGLE, framework="pt") as opened:
        return dict.fromkeys(opened.keys(), folder / _SINGLE)


def _from(read: Callable[[str], Tensor], names: list[str]) -> Originals:
    known = set(names)
    by_end = {name.partition(".")[2]: name for name in names}

    def find(name: str, shape: tuple[int, ...]) -> Tensor | None:
        short = name.partition(".")[2]
        found = name if name in known else short if short in known else by_end.get(name)
        tensor = None if found is None else read(found)
        if tensor is None or not tensor.is_floating_point():
            return None
        if tuple(tensor.shape) == shape[::-1] != shape:  # transformers' Conv1D is turned before it is packed
            tensor = tensor.t()
        return tensor.detach() if tuple(tensor.shape) == shape else None

    return find


def needed(names: list[str]) -> Fault:
    """The fault of weights that are packed, without the original ones."""
    first = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return Fault("init_lora_weights", f"starts from the original weights, and those of {first} are packed",
                 "the weights as they were before", "Pass original=: the folder or Hub id of the model before it was "
                 "quantized")


__all__ = ["Originals", "Source", "needed", "open_originals"]
