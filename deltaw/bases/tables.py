"""A base's vocabulary tables in 8 bits: which they are, whether they can be packed, and packing them as they are read.

The tables are the input embedding and a language model's output layer, tied or not. Positions, token types and other
embeddings are small and keep their numbers, as does a classifier's head. Rows come from the file a strip at a time, so
that a table is never held in 16 bits.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.packed import Int8Rows
from deltaw.core.tables import PackedEmbedding, PackedHead, PackedTable, pack_table
from deltaw.errors import Fault

_REMEDY = "Leave quantize_tables out: the base's tables then stay in 16 bits"


def vocabulary_tables(model: Any) -> dict[str, Any]:
    """The input embedding and the output layer of a model of transformers, by name; those that it has."""
    wanted = [model.get_input_embeddings(), model.get_output_embeddings()]
    return {name: module for name, module in model.named_modules() if any(module is table for table in wanted)}


def table_sizes(model: Any) -> tuple[int, int]:
    """The values and the rows of the tables of a model, tied ones once."""
    weights = {id(table.weight): table.weight for table in vocabulary_tables(model).values()}
    return sum(W.numel() for W in weights.values()), sum(len(W) for W in weights.values())


def table_faults(where: str, skeleton: Any) -> list[Fault]:
    """What keeps the tables of a model without values from being packed."""
    try:
        tables = vocabulary_tables(skeleton)
    except NotImplementedError:  # transformers' word for a network without an input embedding
        tables = {}
    if not tables:
        return [Fault(where, "has no table of a vocabulary that could be packed", "an embedding of tokens", _REMEDY)]
    faults = []
    for name, table in tables.items():
        ours = isinstance(table, nn.Embedding) and table.max_norm is None and (
            type(table).forward is nn.Embedding.forward or _scale(table) is not None)
        if not ours and type(table) is not nn.Linear:
            faults.append(Fault(where, f"'{name}' is a {type(table).__name__}, which has a forward of its own",
                                "an nn.Embedding or nn.Linear", _REMEDY))
    weights = {id(table.weight) for table in tables.values()}
    for name, module in skeleton.named_modules():
        if name not in tables and any(id(p) in weights for p in module._parameters.values()):
            faults.append(Fault(where, f"'{name}' shares its weight with a table of the vocabulary",
                                "a table that only the embedding and the output layer use", _REMEDY))
    return faults


def place_tables(model: Any, dtype: torch.dtype) -> None:
    """Put packed tables, without values yet, where the tables of a model on the meta device are."""
    for name, table in vocabulary_tables(model).items():
        shape = tuple(table.weight.shape)
        with torch.device("meta"):
            weight = Int8Rows(torch.empty(shape, dtype=torch.int8), torch.empty(shape[0]))
        made = PackedHead(table, weight, dtype) if isinstance(table, nn.Linear) else PackedEmbedding(
            table, weight, dtype, _scale(table))
        model.set_submodule(name, made.train(table.training))


def packed_table(model: nn.Module, parameter: str) -> PackedTable | None:
    """The packed table whose weight this is."""
    owner, _, leaf = parameter.rpartition(".")
    module = model.get_submodule(owner)
    return module if isinstance(module, PackedTable) and leaf == "weight" else None


class StoredRows:
    """A table in a safetensors file, in the place of the tensor that transformers would read whole."""

    def __init__(self, file: Path, key: str) -> None:
        self.file, self.key, self.device = file, key, torch.device("cpu")

    def __getitem__(self, _: Any) -> StoredRows:
        """Itself: transformers asks for all of it, and is given it packed (`packed`)."""
        return self

    def to(self, *, device: Any = None, dtype: Any = None) -> StoredRows:
        """Where the codes are to be; they are packed from the numbers as they are stored."""
        self.device = torch.device(device) if device is not None else self.device
        return self

    def packed(self) -> Int8Rows:
        """The table, read and packed a strip of rows at a time.

        Out of a mapped file: one that is read by position gives each strip by reading all of its tensor.
        """
        from safetensors import safe_open

        with safe_open(self.file, framework="pt", backend="mmap") as mapped:
            stored = mapped.get_slice(self.key)
            rows, columns = stored.get_shape()
            return pack_table(stored, (rows, columns), self.device)


def packed_from(given: Any) -> Int8Rows:
    """The codes of a table that is still in its file, or of a tensor where transformers had to make one."""
    if isinstance(given, StoredRows):
        return given.packed()
    W: Tensor = given
    return pack_table(W, (W.shape[0], W.shape[1]), W.device)


def stored_rows(state: Mapping[str, Any], skeleton: Any, files: Mapping[str, Path]) -> dict[str, Any]:
    """The same slices of a checkpoint, its tables as `StoredRows` of the files they are in.

    A checkpoint may name its base network otherwise, so they are found by the end of their names, where nothing else of
    the model is called so.
    """
    tables = vocabulary_tables(skeleton)
    others = {_end(f"{name}.{leaf}") for name, module in skeleton.named_modules() if name not in tables
              for leaf in module._parameters}
    ends = {_end(f"{name}.weight") for name in tables} - others
    return {key: StoredRows(files[key], key) if _is_table(key, value, ends) else value
            for key, value in state.items()}


def _is_table(key: str, value: Any, ends: Collection[str]) -> bool:
    return _end(key) in ends and len(value.get_shape()) == 2


def _end(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _scale(table: nn.Module) -> float | None:
    """The factor that an embedding's class multiplies rows by; None for one that has none, or whose is not known."""
    for name in ("scalar_embed_scale", "embed_scale"):  # the first is a number where the second is a buffer
        value = getattr(table, name, None)
        if isinstance(value, (int, float)):
            return float(value)
        if isinstance(value, Tensor) and not value.is_meta and value.numel() == 1:
            return float(value)
    return None
