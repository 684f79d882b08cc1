"""An adapter as llama.cpp's GGUF file of low-rank factors, for `llama-server --lora` and Ollama's ADAPTER.

    blk.0.attn_q.weight.lora_a   A, (R, I)                  adapter.lora.alpha   one number for the whole file
    blk.0.attn_q.weight.lora_b   B, (O, R)                  ΔW = alpha / R · B A

llama.cpp knows one alpha. Where a site's scale is another than alpha over its rank (rsLoRA, patterns of ranks and
alphas), the difference goes into its B, so that ΔW is the adapter's own.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from deltaw import store
from deltaw.bases import gguf as gguf_bases
from deltaw.bases.sources import find_base, read_config
from deltaw.convert.architecture import Architecture
from deltaw.convert.report import ConvertReport, Dtype
from deltaw.convert.writer import Item, file_type, require_gguf, usable_out, write_gguf
from deltaw.core import Adapter
from deltaw.errors import BaseModelError, Fault, StateError

_EMBEDDING = "token_embd.weight"


def adapter_to_gguf(adapter: Adapter | str | Path, out: str | Path, *, model: str | Path, dtype: Dtype = "f32",
                    overwrite: bool = False) -> ConvertReport:
    """Write an adapter as a GGUF file of low-rank factors; `model` is its base, of which only the config is read.

    Raises StateError for changes that llama.cpp has no form for (biases, modules trained in full, convolutions),
    BaseModelError for an architecture that is not known, ConfigError, MissingDependencyError.

    >>> adapter_to_gguf("adapters/mine", "mine.gguf", model="my/base")                        # doctest: +SKIP
    """
    gguf = require_gguf()
    target = usable_out(Path(out), overwrite=overwrite, dtype=dtype)
    value = adapter if isinstance(adapter, Adapter) else store.load(adapter)
    architecture = Architecture(base_config(str(model)), str(model))
    alpha = _common_alpha(value)
    items, rescaled = _items(value, architecture, alpha)

    def describe(writer: Any) -> None:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        writer.add_file_type(file_type(gguf, dtype))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

    size = write_gguf(target, architecture.family.name, describe, items, dtype)
    return ConvertReport(out=target, kind="adapter", architecture=architecture.family.name, dtype=dtype,
                         tensors=len(items), bytes=size, tokenizer=None, alpha=alpha, rescaled=rescaled)


def base_config(model: str) -> dict[str, Any]:
    """The config of a base; of a GGUF file, that of its conversion."""
    import torch

    place = find_base(model)
    if place.gguf is None:
        return read_config(place)
    kept = gguf_bases.converted(place.gguf, torch.float32) or gguf_bases.convert(place.gguf, torch.float32)[0]
    if kept is None:
        raise BaseModelError(Fault(f"base '{model}'", "its conversion could not be kept",
                                   remedy="Set DELTAW_HOME to a folder with room"))
    return read_config(find_base(str(kept)))


def _common_alpha(adapter: Adapter) -> float:
    """The alpha that most sites have, over their rank: they need no rescaling."""
    alphas = Counter(_alpha(adapter, name) for name, site in adapter.sites.items() if site.is_low_rank)
    return alphas.most_common(1)[0][0] if alphas else 1.0


def _alpha(adapter: Adapter, site: str) -> float:
    """The alpha that gives a site's scale over the rank of its factors as they are written."""
    delta = adapter.sites[site]
    return adapter.scaling(site) * delta.rank * len(delta.geometry.slices or (0,))


def _items(adapter: Adapter, architecture: Architecture, alpha: float) -> tuple[list[Item], int]:
    """A and B of every site by GGUF's names, and how many B were rescaled."""
    faults, items, rescaled = [], [], 0
    for site, delta in adapter.sites.items():
        geometry = delta.geometry
        if geometry.kind not in ("linear", "embedding"):
            faults.append(Fault(f"site '{site}'", f"is of kind '{geometry.kind}'", "a low-rank change of a linear "
                                "layer or the embedding", "Merge it (deltaw merge) and convert the model"))
            continue
        name = architecture.name_of(f"{site}.weight")
        if name is None:
            faults.append(Fault(f"site '{site}'", "has no name in GGUF", f"a module of {architecture.family.name}",
                                "The adapter was made for another base"))
            continue
        gain = _alpha(adapter, site) / alpha
        rescaled += gain != 1.0
        A, B = delta.A.detach(), geometry.dense_out(delta.B.detach())
        if name == _EMBEDDING:  # read by rows there
            A = A.t()
        else:
            B = architecture.rows_of(f"{site}.weight", B)
        B = B if gain == 1.0 else B.float() * gain
        items += [Item(f"{name}.lora_a", tuple(A.shape), partial(_same, A)),
                  Item(f"{name}.lora_b", tuple(B.shape), partial(_same, B))]
    if faults:
        raise StateError(*faults)
    return items, rescaled


def _same(tensor: Tensor) -> Tensor:
    return tensor
