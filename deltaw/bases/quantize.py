"""A quantized base: linear layers in 4 or 8 bits, packed while they are read, so that no 16-bit model is ever held.

transformers builds the skeleton on the meta device, renames what the checkpoint calls otherwise and puts bitsandbytes'
layers in place; tensors are read from the files one at a time (not mapped: pages of a mapped file count as this
process's memory while it is open) and packed by `deltaw.bases.packing`. Embeddings, norms, biases, the output head and
a classifier's head keep their numbers, but for the vocabulary's tables where 8 bits are asked for them too
(`deltaw.bases.tables`). Everything that does not fit is said before a weight is read.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import nn

from deltaw.bases.heads import head_modules
from deltaw.bases.packing import BLOCK, pack_4bit, pack_8bit
from deltaw.bases.tables import packed_from, packed_table, place_tables, stored_rows, table_faults
from deltaw.core.formats import Format, Tables, tables_alone
from deltaw.errors import BaseModelError, ConfigError, Fault, MissingDependencyError, near

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_METHOD = "deltaw-strips"
# What transformers needs to read a checkpoint that was quantized by a method, and how it is installed.
_READERS: Mapping[str, tuple[str, str]] = {
    "bitsandbytes": ("bitsandbytes", "'deltaw[quant]'"), "torchao": ("torchao", "torchao"),
    "gptq": ("gptqmodel", "gptqmodel optimum"), "awq": ("gptqmodel", "gptqmodel optimum"),
    "compressed-tensors": ("compressed_tensors", "compressed-tensors"), "hqq": ("hqq", "hqq"),
    "quanto": ("optimum", "optimum-quanto"), "aqlm": ("aqlm", "aqlm"), "eetq": ("eetq", "eetq"),
    "auto-round": ("auto_round", "auto-round"), "vptq": ("vptq", "vptq"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How linear layers are stored."""

    format: Format
    """nf4, fp4 or int8."""
    double_quant: bool = True
    """4-bit: pack the scales of the blocks too."""
    tables: Tables = "none"
    """How the vocabulary's tables are stored: the input embedding, and the output layer tied to it or not."""

    def __post_init__(self) -> None:
        faults = [Fault(name, f"got {got!r}", "one of " + ", ".join(known), near(str(got), known))
                  for name, got, known in (("quantize", self.format, get_args(Format)),
                                           ("quantize_tables", self.tables, get_args(Tables))) if got not in known]
        if faults:
            raise ConfigError(*faults)

    def __str__(self) -> str:
        linear = f"{self.format}, double quantization" if self.double_quant and self.format != "int8" else self.format
        return linear if self.tables == "none" else f"{linear}, {self.tables} tables"

    @classmethod
    def read(cls, text: str | None) -> Quantization | None:
        """What `str` gave; None for other words, such as the method of a checkpoint that came quantized.

        >>> Quantization.read("nf4, double quantization"), Quantization.read("gptq")
        (Quantization(format='nf4', double_quant=True), None)
        """
        formats: tuple[Format, ...] = get_args(Format)
        ways = (cls(format=name, double_quant=double, tables=tables) for name in formats for double in (True, False)
                for tables in get_args(Tables))
        return next((way for way in ways if str(way) == text), None)


def asked_quantization(quantize: Format | None, double_quant: bool, tables: Tables) -> Quantization | None:
    """What the options of a base ask for; ConfigError for tables alone."""
    fault = tables_alone("quantize_tables", quantize, tables)
    if fault is not None:
        raise ConfigError(fault)
    return None if quantize is None else Quantization(format=quantize, double_quant=double_quant, tables=tables)


def stored_quantization(config: Any) -> str | None:
    """The method by which a checkpoint is quantized already, as its config names it; None for a plain one."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    values = found if isinstance(found, Mapping) else found.to_dict()
    method = values.get("quant_method") or "bitsandbytes"
    return str(getattr(method, "value", method))


def check_reader(source: str, config: Any) -> None:
    """Refuse a quantized checkpoint whose package is not installed."""
    method = stored_quantization(config)
    package, install = _READERS.get(method or "", ("", ""))
    if package and importlib.util.find_spec(package) is None:
        raise MissingDependencyError(Fault(f"base '{source}'", f"is quantized by {method}, and '{package}' is not "
                                           "installed", remedy=f"Install it: pip install {install}; or give the "
                                           "unquantized base"))


def check_quantizable(source: str, skeleton: PreTrainedModel, config: Any, wanted: Quantization,
                      keep: tuple[str, ...]) -> None:
    """Refuse what cannot be quantized here, with every reason at once; `skeleton` is on the meta device."""
    where = f"base '{source}'"
    missing = [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]
    faults = []
    if missing:
        faults.append(Fault(f"quantize={wanted.format}", "needs " + " and ".join(missing),
                            remedy="Install it: pip install 'deltaw[quant]'"))
    method = stored_quantization(config)
    if method is not None:
        faults.append(Fault(where, f"is quantized already ({method})", "a base in 16 or 32 bits",
                            "Leave quantize out to use it as it is, or give the unquantized base"))
    layers = {name: layer for name, layer in linear_layers(skeleton).items() if name not in keep}
    if not layers:
        faults.append(Fault(where, "has no linear layer to quantize", "a network with linear layers",
                            "Leave quantize out"))
    # bitsandbytes packs them, and its kernel for the CPU then reads some of them with another block's scale.
    odd = [f"{name} ({inputs_of(layer)} inputs)" for name, layer in layers.items()
           if wanted.format != "int8" and inputs_of(layer) % BLOCK]
    if odd:
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        faults.append(Fault(where, f"cannot be stored in blocks of {BLOCK}: {', '.join(odd[:3])}{more}",
                            f"inputs divisible by {BLOCK}", "Use quantize=int8, which has no blocks"))
    if wanted.tables != "none":
        faults += table_faults(where, skeleton)
    if faults:
        raise (MissingDependencyError if missing else BaseModelError)(*faults)


def linear_layers(model: nn.Module) -> dict[str, Any]:
    """The layers that can be quantized: `nn.Linear` and transformers' `Conv1D`, by their exact class."""
    from transformers.pytorch_utils import Conv1D

    return {name: module for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)}


def inputs_of(layer: Any) -> int:
    """How many inputs a linear layer has, also one that stores its weight transposed."""
    return int(layer.weight.shape[1 if type(layer) is nn.Linear else 0])


def kept_modules(skeleton: PreTrainedModel, folder: Path) -> tuple[str, ...]:
    """Modules that stay as they are: heads, and linear layers that the checkpoint has no weights for."""
    output = skeleton.get_output_embeddings()
    stored = {_tail(key) for key in tensor_files(folder)}
    heads = head_modules(skeleton)
    kept = set(heads)
    for name, layer in linear_layers(skeleton).items():
        inside = any(name.startswith(head + ".") for head in heads)
        if layer is output or inside or _tail(f"{name}.weight") not in stored:
            kept.add(name)
    return tuple(sorted(kept))


def load_quantized(skeleton: PreTrainedModel, folder: Path, config: Any, dtype: torch.dtype, device: torch.device,
                   wanted: Quantization, keep: tuple[str, ...]) -> tuple[Any, dict[str, Any]]:
    """The model of a folder with its linear layers packed, on `device`, and transformers' report of the loading.

    Never holds more than the packed model and, of one tensor, the stored numbers, those in `dtype` and the codes.
    """
    from safetensors import safe_open
    from transformers import GenerationConfig

    files = tensor_files(folder)
    with ExitStack() as stack:
        opened = {file: stack.enter_context(safe_open(folder / file, framework="pt", backend="pread"))
                  for file in sorted(set(files.values()))}
        state = {key: opened[file].get_slice(key) for key, file in files.items()}
        if wanted.tables != "none":
            state = stored_rows(state, skeleton, {key: folder / file for key, file in files.items()})
        model, report = type(skeleton).from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, device_map={"": device}, output_loading_info=True,
            ignore_mismatched_sizes=True, quantization_config=_settings(wanted, dtype, keep, own=True))
    # Named as bitsandbytes' from here on: saved like any other of its models.
    settings = _settings(wanted, dtype, keep, own=False)
    model.config.quantization_config = model.hf_quantizer.quantization_config = settings
    model.quantization_method = settings.quant_method
    if model.can_generate():
        with suppress(OSError):  # many bases have none
            model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, report


def tensor_files(folder: Path) -> dict[str, str]:
    """The safetensors file of each tensor of a checkpoint."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if not (folder / "model.safetensors").is_file() and index.is_file():
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    single = folder / "model.safetensors"
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    found: dict[str, str] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            found |= dict.fromkeys(opened.keys(), file.name)
    return found


def _tail(key: str) -> str:
    """The last three parts of a tensor's name, which a checkpoint of another head or prefix shares."""
    return ".".join(key.split(".")[-3:])


def _settings(wanted: Quantization, dtype: torch.dtype, keep: tuple[str, ...], *, own: bool) -> Any:
    """bitsandbytes' settings, under the name of our way of packing where `own`."""
    from transformers import BitsAndBytesConfig

    # While loading, patterns of exact names: a plain one would also match every module whose name ends with it.
    skip = [f"^{re.escape(name)}$" for name in keep] if own else list(keep)
    options: dict[str, Any] = {"llm_int8_skip_modules": skip}
    if wanted.format == "int8":
        settings = BitsAndBytesConfig(load_in_8bit=True, **options)
    else:
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=wanted.format,
                                      bnb_4bit_compute_dtype=dtype,
                                      bnb_4bit_use_double_quant=wanted.double_quant, **options)
    if own:
        _register()
        settings.quant_method = f"{_METHOD}-{8 if wanted.format == 'int8' else 4}"
        settings.tables, settings.tables_dtype = wanted.tables, dtype
    return settings


@cache
def _register() -> None:
    """Tell transformers of bitsandbytes' quantizers with our way of packing in the place of theirs."""
    import bitsandbytes
    from transformers.core_model_loading import ConversionOps
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.auto import register_quantizer
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
    from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

    class Pack(ConversionOps):  # type: ignore[misc]
        """Packs one weight on its way from the file into the model."""

        def __init__(self, quantizer: Any) -> None:
            self.quantizer = quantizer

        def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, Any]:
            (name, given), = input_dict.items()
            W = given[0] if isinstance(given, list) else given
            if packed_table(model, name) is not None:
                return {name: packed_from(W)}
            module = model.get_submodule(name.rpartition(".")[0])
            if issubclass(module.source_cls, Conv1D):
                W = W.t().contiguous()
            module._is_hf_initialized = True
            settings = self.quantizer.quantization_config
            if settings.load_in_8bit:
                codes, absmax = pack_8bit(W)
                return {name: bitsandbytes.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes,
                                                         SCB=absmax)}
            codes, state = pack_4bit(W, settings.bnb_4bit_quant_type, double_quant=settings.bnb_4bit_use_double_quant)
            module.quant_state = state
            return {name: bitsandbytes.nn.Params4bit(
                codes, requires_grad=False, quant_state=state, blocksize=BLOCK, bnb_quantized=True, module=module,
                compress_statistics=settings.bnb_4bit_use_double_quant, quant_type=settings.bnb_4bit_quant_type)}

    for bits, theirs in ((4, Bnb4BitHfQuantizer), (8, Bnb8BitHfQuantizer)):
        ours = type(theirs.__name__, (_WithTables, theirs), {"get_quantize_ops": lambda self: Pack(self)})
        register_quantizer(f"{_METHOD}-{bits}")(ours)


class _WithTables:
    """What tables in 8 bits add to a quantizer of transformers."""

    quantization_config: Any

    def _process_model_before_weight_loading(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        found = super()._process_model_before_weight_loading(model, *args, **kwargs)  # type: ignore[misc]
        if self.quantization_config.tables != "none":
            place_tables(model, self.quantization_config.tables_dtype)
        return found

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return packed_table(model, param_name) is not None or bool(
            super().param_needs_quantization(model, param_name, **kwargs))  # type: ignore[misc]
