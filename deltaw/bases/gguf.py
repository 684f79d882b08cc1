"""A GGUF file as a base: converted once to a safetensors folder, which later loads read in milliseconds.

transformers reads GGUF by dequantising every tensor, which takes 14 s for 135M parameters; the folder is kept in
`DELTAW_HOME` (by default ~/.cache/deltaw). Its name holds a hash of the file's size, time and sampled content, so
that a changed file is converted anew, and it appears by one rename, so that a killed conversion leaves no half.
"""

from __future__ import annotations

import hashlib
import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch

from deltaw.bases.quiet import quiet_transformers
from deltaw.core.home import home
from deltaw.core.kept import keep
from deltaw.errors import BaseModelError, Fault, MissingDependencyError

_BLOCK = 1 << 16
_BLOCKS = 64


def converted(file: Path, dtype: torch.dtype) -> Path | None:
    """The kept conversion of this GGUF file that loads as this dtype without loss, or None when there is none yet."""
    folders = [_folder(file, dtype), _folder(file, torch.float32)]
    return next((folder for folder in folders if folder.is_dir()), None)


def kept(file: Path) -> Path | None:
    """The folder that loads without loss in any dtype, converted now if it never was; None if it cannot be kept."""
    return converted(file, torch.float32) or convert(file, torch.float32)[0]


def convert(file: Path, dtype: torch.dtype) -> tuple[Path | None, Any, Any]:
    """The folder with the converted file, and the model and tokenizer that were read from it.

    The weights are stored in `dtype`, the one they are computed in, which loses nothing that loading would keep. The
    folder is None, with a warning, when it could not be kept (disk full, read-only); the model is good nevertheless.
    """
    model, tokenizer = _read(file, dtype)
    folder = _folder(file, dtype)

    def fill(partial: Path) -> None:
        with quiet_transformers():
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)

    try:
        keep(folder, fill)
    except Exception as error:  # safetensors has an exception of its own for a full disk
        warnings.warn(f"The conversion of {file} could not be kept in {folder.parent} ({error}); it will be repeated "
                      "at the next load. Set DELTAW_HOME to a folder with room.", stacklevel=2)
    return (folder if folder.is_dir() else None), model, tokenizer


def _read(file: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(Fault(f"base '{file}'", "reading GGUF needs " + " and ".join(missing),
                                           remedy="Install it: pip install 'deltaw[gguf]'"))
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise BaseModelError(Fault(f"base '{file}'", "is not a GGUF file or is damaged",
                                       "a file that starts with 'GGUF'"))
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            # Without dequantize=True the model stays marked as quantized and can be neither saved nor trained.
            model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype,
                                                         quantization_config=GgufConfig(dequantize=True))
    except Exception as error:  # the reader raises whatever its parsing of the bytes meets
        raise BaseModelError(Fault(f"base '{file}'", f"cannot be read: {error}", "a GGUF file of an architecture "
                                   "that transformers converts")) from error
    return model, tokenizer


def _folder(file: Path, dtype: torch.dtype) -> Path:
    return home() / "gguf" / f"{file.stem}-{_digest(file)[:16]}-{str(dtype).removeprefix('torch.')}"


def _digest(file: Path) -> str:
    """A hash of size, time, both ends and evenly spaced blocks: milliseconds for a file of any size."""
    facts = file.stat()
    digest = hashlib.sha256(f"{facts.st_size} {facts.st_mtime_ns}".encode())
    with file.open("rb") as opened:
        for i in range(_BLOCKS):
            opened.seek(max(0, facts.st_size - _BLOCK) * i // (_BLOCKS - 1))
            digest.update(opened.read(_BLOCK))
    return digest.hexdigest()
