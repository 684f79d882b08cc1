"""The model of `eval`, `generate` and `chat`: a base with adapters on it, and what to say when they do not fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from deltaw.cli.output import say
from deltaw.errors import AdapterFileError, ConfigError, Fault, StateError

if TYPE_CHECKING:
    from deltaw.baselines import Baseline, SavedBaseline
    from deltaw.bases import Base
    from deltaw.core import Adapter
    from deltaw.switch import Switchboard


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which base, and where and how it is computed."""

    model: str | None = None
    """The base: a Hub id, a local folder, a GGUF file or package:NAME; by default the one that the adapter records."""
    device: str = "auto"
    """Where to compute: cpu, cuda, mps, or auto (a GPU where there is one)."""
    dtype: str = "auto"
    """Number format of the base: bf16, fp32, fp16, or auto (bf16 where the processor is fast at it)."""
    quantize: Literal["none", "nf4", "fp4", "int8"] = "none"
    """Store the base's linear layers in 4 or 8 bits while it is loaded: nf4, fp4 or int8."""
    double_quant: bool = True
    """With nf4 and fp4, pack the scales of the blocks too."""
    quantize_tables: Literal["none", "int8"] = "none"
    """With quantize, store the embedding and the output layer too: int8, one scale for each row."""
    any_base: bool = False
    """Use the adapter although it was made for another base of the same shapes."""


METAVARS: Mapping[str, str] = {"model": "MODEL", "device": "NAME", "dtype": "bf16|fp32|fp16|auto", "data": "DATA",
                               "adapter": "FOLDER"}


@dataclass
class Opened:
    """A base, and the board of its adapters once there are any."""

    options: ModelOptions
    base: Base
    board: Switchboard | None = None
    baseline: Baseline | None = None
    """Another method's values on the model, in an adapter's stead."""

    def add(self, name: str, adapter: Adapter | SavedBaseline) -> None:
        """Attach an adapter under a name, off; a template or tokenizer that it was not trained with is reported."""
        from deltaw import switch
        from deltaw.core import Adapter

        model = self.base.model
        if not isinstance(adapter, Adapter):
            self.baseline = adapter.put_on(model, any_base=self.options.any_base)
            self.baseline.use(False)
            model.eval()
        elif self.board is None:
            self.board = switch.attach(model, adapter, name, any_base=self.options.any_base)
            self.board.use(None)
            model.eval()
        else:
            self.board.add(name, adapter, any_base=self.options.any_base)
        for text in mismatches(adapter, self.base):
            say(f"warning: adapter '{name}': {text}")

    @property
    def is_on(self) -> bool:
        """Whether anything is on beside the base."""
        return bool(self.baseline.is_on if self.baseline is not None else self.board is not None and self.board.active)

    def use(self, choice: str | Mapping[str, float] | None) -> None:
        """Turn on an adapter, a mix or the base."""
        if self.baseline is not None:
            self.baseline.use(choice is not None)
        elif self.board is not None:
            self.board.use(choice)
        elif choice is not None:
            raise StateError(Fault("use", "no adapter is attached", "at least one", "Add one first"))


def read_adapter(path: str, remedy: str = "`deltaw eval` and `deltaw generate` take it") -> Adapter:
    """The adapter in a folder or of a Hub id; `remedy` is what to do with another method's folder."""
    from deltaw import baselines, store

    if baselines.is_baseline(path):
        method = baselines.read(path).recipe.method
        raise AdapterFileError(Fault(path, f"was trained with method {method}", "an adapter of method lora",
                                     remedy))
    return store.load(path)


def read_tuned(path: str) -> Adapter | SavedBaseline:
    """The adapter in a folder or of a Hub id, or what another method left in a folder."""
    from deltaw import baselines

    return baselines.read(path) if baselines.is_baseline(path) else read_adapter(path)


def open_model(options: ModelOptions, adapters: Mapping[str, Adapter | SavedBaseline], *,
               labels: list[str] | None = None, task: Literal["causal-lm", "seq-cls"] = "causal-lm") -> Opened:
    """The base that the options name, or else the first adapter, with all of these adapters attached, and off."""
    from deltaw import bases

    source = options.model or recorded_base(adapters)
    device = bases.chosen_device(options.device)
    base = bases.load_base(source, task=task, dtype=options.dtype, labels=labels, device=device,
                           quantize=None if options.quantize == "none" else options.quantize,
                           double_quant=options.double_quant, quantize_tables=options.quantize_tables)
    opened = Opened(options, base)
    for name, adapter in adapters.items():
        opened.add(name, adapter)
    return opened


def recorded_base(adapters: Mapping[str, Adapter | SavedBaseline]) -> str:
    """The base that the first adapter names."""
    for adapter in adapters.values():
        source = adapter.facts.get("base_model")
        if isinstance(source, str) and source:
            return source
        break
    got = "is not given, and the adapter does not record its base" if adapters else "is not given"
    raise ConfigError(Fault("--model", got, "a Hub id, a folder, a GGUF file or package:NAME"))


def mismatches(adapter: Adapter | SavedBaseline, base: Base) -> list[str]:
    """What the adapter records about its base's quantization, template and tokenizer, and this base has otherwise."""
    from deltaw.bases import template

    return template.mismatches(adapter.facts, quantized=base.quantized, template=template.template_hash(base.tokenizer),
                               tokenizer=template.tokenizer_hash(base.tokenizer))


def training_facts(adapter: Adapter | SavedBaseline | None) -> dict[str, Any]:
    """The config that an adapter was trained with, and what its rows looked like; empty where it records nothing."""
    training = adapter.facts.get("training") if adapter is not None else None
    if not isinstance(training, dict):
        return {}
    config, data = training.get("config"), training.get("data")
    facts = dict(config) if isinstance(config, dict) else {}
    if isinstance(data, dict):
        facts |= {"shape": data.get("shape"), "labels": data.get("labels")}
    return facts


def is_classifier(adapter: Adapter | SavedBaseline | None) -> bool:
    """Whether an adapter chooses labels instead of writing text."""
    return adapter is not None and (training_facts(adapter).get("task") == "seq-cls"
                                    or getattr(adapter.config, "task_type", None) == "SEQ_CLS")


def require_writer(adapter: Adapter | SavedBaseline, where: str) -> None:
    """Refuse an adapter that was trained to classify."""
    if is_classifier(adapter):
        raise AdapterFileError(Fault(where, "was trained to choose labels", "an adapter that writes text",
                                     "Measure it with `deltaw eval`"))
