"""A GGUF file, written tensor by tensor beside its target and renamed when it is whole."""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltaw.convert.report import DTYPES, Dtype
from deltaw.errors import ConfigError, Fault, MissingDependencyError, near

_BLOCK = 32
"""Values of a q8_0 block, which a row must divide into."""


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor to write: its name, its shape, and where its values come from."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def require_gguf() -> Any:
    """The `gguf` package, or how to get it."""
    if importlib.util.find_spec("gguf") is None:
        raise MissingDependencyError(Fault("convert", "writing GGUF needs gguf",
                                           remedy="Install it: pip install 'deltaw[gguf]'"))
    import gguf

    return gguf


def usable_out(out: Path, *, overwrite: bool, dtype: str) -> Path:
    """The path to write to, if it may be written."""
    faults = []
    if dtype not in DTYPES:
        faults.append(Fault("dtype", f"got {dtype!r}", " or ".join(DTYPES), near(dtype, DTYPES)))
    out = out.expanduser()
    if out.is_dir():
        faults.append(Fault(f"out '{out}'", "is a folder", "a file name", f"Did you mean {out / 'model.gguf'}?"))
    elif out.exists() and not overwrite:
        faults.append(Fault(f"out '{out}'", "exists", "a new file", "Choose another, or pass overwrite=True"))
    if faults:
        raise ConfigError(*faults)
    return out


def write_gguf(out: Path, architecture: str, describe: Callable[[Any], None], items: list[Item], dtype: Dtype) -> int:
    """Write the file: metadata by `describe(writer)`, then the items, one in memory at a time; returns its size.

    Matrices are stored in `dtype`, everything else in float32, as llama.cpp wants it.
    """
    gguf = require_gguf()
    with _beside(out) as partial:
        writer = gguf.GGUFWriter(partial, architecture)
        with closing(writer):
            describe(writer)
            _fill(gguf, writer, items, dtype)
    return out.stat().st_size


def _fill(gguf: Any, writer: Any, items: list[Item], dtype: Dtype) -> None:
    """The header and the tensors."""
    for item in items:
        kind = _kind(item.shape, dtype)
        empty = np.empty(0, np.uint8 if kind == "q8_0" else np.float16 if kind == "f16" else np.float32)
        count = int(np.prod(item.shape))
        size = {"f32": 4 * count, "f16": 2 * count, "bf16": 2 * count, "q8_0": count // _BLOCK * (_BLOCK + 2)}[kind]
        shape = (*item.shape[:-1], item.shape[-1] // _BLOCK * (_BLOCK + 2)) if kind == "q8_0" else item.shape
        writer.add_tensor_info(item.name, shape, empty.dtype, size, _raw(gguf, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for item in items:
        writer.write_tensor_data(_encoded(gguf, item, _kind(item.shape, dtype)))


def file_type(gguf: Any, dtype: Dtype) -> Any:
    """GGUF's name of a file whose matrices are in this format."""
    names = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    return gguf.LlamaFileType[names[dtype]]


def _kind(shape: tuple[int, ...], dtype: Dtype) -> Dtype:
    """What a tensor is stored in: vectors stay in float32, rows that are no whole blocks in float16."""
    if len(shape) < 2:
        return "f32"
    return "f16" if dtype == "q8_0" and shape[-1] % _BLOCK else dtype


def _raw(gguf: Any, kind: Dtype) -> Any:
    return gguf.GGMLQuantizationType[kind.upper()]


def _encoded(gguf: Any, item: Item, kind: Dtype) -> Any:
    values = item.read()
    assert tuple(values.shape) == item.shape, item.name
    if kind == "f16":
        largest = float(values.abs().max()) if values.numel() else 0.0
        if largest > torch.finfo(torch.float16).max:
            raise ConfigError(Fault(f"'{item.name}'", f"has a value of {largest:.3g}, too large for f16",
                                    "bf16, f32 or q8_0"))
        return values.half().contiguous().numpy()
    wide = values.float().contiguous()
    if kind == "bf16":
        return wide.bfloat16().view(torch.uint8).numpy()
    return wide.numpy() if kind == "f32" else gguf.quants.quantize(wide.numpy(), gguf.GGMLQuantizationType.Q8_0)


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A file beside `out`, renamed to it when the block is done, and gone if it fails."""
    partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(out)
    except OSError as error:
        raise ConfigError(Fault(f"out '{out}'", f"cannot be written ({error.strerror or error})", "a writable place",
                                "Nothing was changed")) from error
    finally:
        partial.unlink(missing_ok=True)
