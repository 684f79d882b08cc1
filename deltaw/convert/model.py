"""A model folder as one GGUF file, tensor by tensor."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from deltaw.bases.sources import Place, find_base, read_config
from deltaw.convert.architecture import Architecture
from deltaw.convert.report import ConvertReport, Dtype
from deltaw.convert.tokenizer import copy_from_gguf, describe_tokenizer
from deltaw.convert.writer import Item, file_type, require_gguf, usable_out, write_gguf
from deltaw.errors import BaseModelError, Fault
from deltaw.merge.checkpoint import Checkpoint, Stored, read_checkpoint
from deltaw.merge.unpacked import unpacked

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def model_to_gguf(model: str | Path, out: str | Path, *, dtype: Dtype = "f16", tokenizer: str | Path | None = None,
                  overwrite: bool = False) -> ConvertReport:
    """Write a model folder, such as `merge_files` makes, as a GGUF file that llama.cpp and Ollama load.

    `dtype` is the format of its matrices. The tokenizer is that of the folder's tokenizer.json, or copied from the GGUF
    file `tokenizer`, which is the safer choice where the base came as one. Of weights that bitsandbytes packed, the
    values are written. Raises BaseModelError for an architecture or a tokenizer that is not known, ConfigError,
    MissingDependencyError.

    >>> model_to_gguf("models/mine", "mine.gguf", dtype="q8_0")                               # doctest: +SKIP
    """
    gguf = require_gguf()
    target = usable_out(Path(out), overwrite=overwrite, dtype=dtype)
    place = find_base(str(model))
    if place.gguf is not None:
        raise BaseModelError(Fault(f"base '{model}'", "is a GGUF file already", "a model folder"))
    config = read_config(place)
    architecture = Architecture(config, str(model))
    checkpoint = unpacked(read_checkpoint(place.folder), None)
    items = _items(checkpoint, architecture, str(model))
    source = ""

    def describe(writer: Any) -> None:
        nonlocal source
        writer.add_type("model")
        writer.add_name(Path(place.source).name)
        writer.add_file_type(file_type(gguf, dtype))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        architecture.describe(writer)
        source = _tokenizer(place, tokenizer, int(config["vocab_size"]), writer)

    size = write_gguf(target, architecture.family.name, describe, items, dtype)
    return ConvertReport(out=target, kind="model", architecture=architecture.family.name, dtype=dtype,
                         tensors=len(items), bytes=size, tokenizer=source)


def _tokenizer(place: Place, given: str | Path | None, size: int, writer: Any) -> str:
    if given is None:
        return describe_tokenizer(place.folder, size, writer)
    file = find_base(str(given)).gguf
    if file is None:
        raise BaseModelError(Fault(f"tokenizer '{given}'", "is no GGUF file", "a GGUF file of the same base"))
    return copy_from_gguf(file, writer)


def _items(checkpoint: Checkpoint, architecture: Architecture, source: str) -> list[Item]:
    """Every tensor of the checkpoint by GGUF's name; a head tied to the embedding is left out, as llama.cpp does."""
    faults, items = [], [Item(name, tuple(tensor.shape), partial(_same, tensor)) for name, tensor
                         in architecture.extra()]
    for name, stored in checkpoint.tensors.items():
        if name == _HEAD and architecture.config.get("tie_word_embeddings") and _EMBEDDING in checkpoint.tensors:
            continue
        if name.endswith("rotary_emb.inv_freq"):  # old checkpoints keep what the config says anyway
            continue
        found = architecture.name_of(name)
        if found is None or not stored.is_float:
            faults.append(Fault(f"tensor '{name}'", "has no name in GGUF" if found is None else f"holds {stored.dtype}",
                                f"a tensor of {architecture.family.name}"))
        else:
            items.append(Item(found, stored.shape, partial(_read, checkpoint, architecture, stored)))
    if faults or not items:
        raise BaseModelError(*faults[:20] or [Fault(f"base '{source}'", "holds no tensors", "a model")])
    return items


def _read(checkpoint: Checkpoint, architecture: Architecture, stored: Stored) -> Tensor:
    return architecture.value_of(stored.name, checkpoint.read(stored))


def _same(tensor: Tensor) -> Tensor:
    return tensor
