"""The shapes of a base: from a published shape's name, a folder's headers, a GGUF file's, or those of a Hub repository.

No weight is read, and of the Hub nothing is fetched but a config and the first bytes of each safetensors file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaw.errors import BaseModelError, Fault, near
from deltaw.plan.architectures import ARCHITECTURES

if TYPE_CHECKING:
    import torch
    from torch import nn

    from deltaw.bases.sources import Place

_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "I64": 64, "I32": 32, "I16": 16,
         "I8": 8, "U8": 8, "BOOL": 8}
_STORED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What is known of a base without its weights."""

    source: str
    """The base as it was asked for."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """What its config.json says; nothing of a GGUF file."""
    task: str = "causal-lm"
    num_labels: int = 2
    stored_bytes: int = 0
    """Size of its weights on disk; 0 where there are none."""
    stored_dtype: str | None = None
    """Number format of most of them."""
    gguf: Place | None = None
    """The GGUF file that it is read from, which has to be converted first."""

    @cached_property
    def config(self) -> Any:
        """Its config, as transformers has it; raises BaseModelError where it makes none of these values."""
        found = _from_values(self.source, dict(self.values)) if self.gguf is None else _from_gguf(self.gguf)
        if self.task == "seq-cls":
            found.num_labels = self.num_labels
            if found.pad_token_id is None:
                found.pad_token_id = 0
        return found

    @property
    def layers(self) -> int:
        """How often the network repeats its layer."""
        return int(getattr(self.config.get_text_config(), "num_hidden_layers", 1))

    @property
    def period(self) -> int:
        """After how many layers the kinds of layers repeat."""
        kinds = getattr(self.config.get_text_config(), "layer_types", None) or ["same"]
        return next(n for n in range(1, len(kinds) + 1)
                    if all(kinds[i] == kinds[i % n] for i in range(len(kinds))))

    @property
    def positions(self) -> int | None:
        """The longest sequence that the network takes, where it states one: training refuses a longer one."""
        stated = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return None if stated is None else int(stated)

    def skeleton(self, task: str, dtype: torch.dtype, layers: int | None = None) -> nn.Module:
        """The network with shapes and no values, all of it or its first layers; frozen, in training mode."""
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        from deltaw.bases.quiet import quiet_transformers

        config = self.config if layers is None else _cut(self.config, layers)
        auto: Any = AutoModelForCausalLM if task == "causal-lm" else AutoModelForSequenceClassification
        try:
            with quiet_transformers(), torch.device("meta"):
                model = auto.from_config(config, dtype=dtype)
        except ValueError as error:  # transformers' words for an architecture without this head
            raise BaseModelError(Fault(f"base '{self.source}'", f"its architecture '{self.config.model_type}' has no "
                                       f"form for task '{task}'", "another base, or another task")) from error
        network: nn.Module = model.train().requires_grad_(False)
        return network


def read_shapes(model: str, *, task: str = "causal-lm", num_labels: int = 2) -> Shapes:
    """What is known of the base `model`; raises BaseModelError where its shapes cannot be found."""
    about: dict[str, Any] = {"source": model, "task": task, "num_labels": num_labels}
    if model in ARCHITECTURES:
        return Shapes(**about, values=ARCHITECTURES[model])
    return Shapes(**about, **(_local(model) if is_local(model) else _hub(model)))


def is_local(model: str) -> bool:
    """Whether this names files of this machine, and no Hub repository (`owner/name`, or a name alone)."""
    from deltaw.bases.sources import PACKAGE

    path = Path(model).expanduser()
    return model.startswith(PACKAGE) or path.exists() or path.suffix.lower() == ".gguf" or model.count("/") > 1


def _local(model: str) -> dict[str, Any]:
    """What files of this machine say: fields of `Shapes`."""
    from deltaw.bases.sources import find_base, read_config
    from deltaw.merge.checkpoint import read_checkpoint

    place = find_base(model)
    if place.gguf is not None:
        return {"gguf": place, "stored_bytes": place.gguf.stat().st_size}
    sizes: dict[str, int] = {}
    for tensor in read_checkpoint(place.folder).tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.end - tensor.begin
    return {"values": read_config(place), "stored_bytes": sum(sizes.values()), "stored_dtype": _most(sizes)}


def _most(sizes: dict[str, int]) -> str | None:
    return _STORED.get(max(sizes, key=lambda name: sizes[name], default=""))


def _from_gguf(place: Place) -> Any:
    """The config that a GGUF file's header amounts to."""
    from transformers import AutoConfig

    from deltaw.bases.quiet import quiet_transformers

    assert place.gguf is not None
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(place.folder, gguf_file=place.gguf.name)
    except Exception as error:  # the reader raises whatever its parsing of the bytes meets
        raise BaseModelError(Fault(f"base '{place.source}'", f"its header cannot be read: {_first_line(error)}",
                                   "a GGUF file of an architecture that transformers converts")) from error


def _hub(model: str) -> dict[str, Any]:
    """Config and headers of a Hub repository: fields of `Shapes`."""
    import huggingface_hub
    from huggingface_hub import errors

    from deltaw.bases.sources import Place, read_config

    where = f"base '{model}'"
    try:
        metadata = huggingface_hub.get_safetensors_metadata(model)
        file = huggingface_hub.hf_hub_download(model, "config.json")
    except errors.NotASafetensorsRepoError as error:
        raise BaseModelError(Fault(where, "has no safetensors headers on the Hub", "weights as safetensors",
                                   "Plan by the name of a published shape, or by a folder with a config.json "
                                   "and weights")) from error
    except errors.GatedRepoError as error:
        raise BaseModelError(Fault(where, "is gated", "an account that was given access",
                                   "Ask for access on its page, then: hf auth login")) from error
    except Exception as error:  # the HTTP library, and so the class of a failed connection, differs by version
        raise BaseModelError(Fault(where, "is neither a folder nor a published shape known here, and its headers "
                                   f"cannot be read from the Hub ({_first_line(error)})", "a folder, a Hub id, or one "
                                   "of " + ", ".join(ARCHITECTURES), near(model.rpartition("/")[2].lower(),
                                                                          ARCHITECTURES))) from error
    place = Place(model, "hub", Path(file).parent)
    sizes: dict[str, int] = {dtype: count * _BITS.get(dtype, 16) // 8
                             for dtype, count in metadata.parameter_count.items()}
    return {"values": read_config(place), "stored_bytes": sum(sizes.values()), "stored_dtype": _most(sizes)}


def _from_values(model: str, values: dict[str, Any]) -> Any:
    """The config that transformers makes of these values."""
    from transformers import CONFIG_MAPPING, AutoConfig

    from deltaw.bases.quiet import quiet_transformers

    kind = values.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        raise BaseModelError(Fault(f"base '{model}'", f"has the unknown architecture {kind!r}",
                                   "a model type that transformers knows", near(str(kind), CONFIG_MAPPING.keys())))
    try:
        with quiet_transformers():
            return AutoConfig.for_model(kind, **values)
    except Exception as error:  # a config checks its own values, each in its own way
        raise BaseModelError(Fault(f"base '{model}'", "has a config.json that does not load: "
                                   + _first_line(error))) from error


def _cut(config: Any, layers: int) -> Any:
    """The config of the network's first layers."""
    values = config.to_dict()
    text = config.get_text_config()
    if text is not config:
        return config  # a composed model: too many kinds of parts to cut
    name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    values |= {name: layers}
    if values.get("layer_types"):
        values["layer_types"] = values["layer_types"][:layers]
    kind = values.pop("model_type")
    return type(config)(**{k: v for k, v in values.items() if k != "transformers_version"}) if kind else config


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
