"""`deltaw convert`: a model or an adapter as a file for other programs."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from deltaw.cli.build import build
from deltaw.cli.main import VERBS
from deltaw.cli.models import METAVARS, read_adapter, recorded_base
from deltaw.cli.options import add_options, given
from deltaw.cli.output import print_json
from deltaw.cli.parser import Parser, UsageError
from deltaw.errors import ConfigError, Fault

if TYPE_CHECKING:
    from deltaw.convert import ConvertReport

EPILOG = """\
With --adapter the file holds the adapter alone, for `llama-server --lora`; without, the model of --model, such as one
that `deltaw merge` wrote.

  deltaw convert --to gguf --model models/mine --out mine.gguf --dtype q8_0
  deltaw convert --to gguf --adapter adapters/mine --out mine-lora.gguf
  deltaw convert --to gguf --model models/mine --out mine.gguf --modelfile
"""
MODELFILE = "Modelfile"


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """What to convert, and to what."""

    to: Literal["gguf", "peft"]
    """The form: gguf, for llama.cpp and Ollama; or peft, an adapter's folder written anew for PEFT and its readers."""
    out: str
    """The file to write; with peft, the folder."""
    model: str | None = None
    """The model folder; with --adapter, its base, by default the one that the adapter records."""
    adapter: str | None = None
    """The adapter: its folder or a Hub id."""
    dtype: Literal["f32", "f16", "bf16", "q8_0"] | None = None
    """Number format of the matrices; by default f16 for a model, f32 for an adapter."""
    tokenizer: str | None = None
    """A GGUF file of the same base to copy the tokenizer from; by default it is the model's tokenizer.json."""
    modelfile: bool = False
    """Write a Modelfile for Ollama beside the file, with the chat template."""
    base_gguf: str | None = None
    """With --modelfile and --adapter: the base's own GGUF file, by the name that the Modelfile shall have it."""
    overwrite: bool = False
    """Replace what is already at `out`."""


def parser() -> Parser:
    """What, to what, and where."""
    made = Parser("convert", VERBS["convert"], epilog=EPILOG,
                  usage="convert --to gguf [--model MODEL] [--adapter FOLDER] --out FILE [OPTIONS]")
    add_options(made, ConvertOptions, "What to convert", metavars={
        **METAVARS, "to": "gguf|peft", "out": "FILE", "dtype": "f32|f16|bf16|q8_0", "tokenizer": "GGUF",
        "base_gguf": "GGUF"})
    made.add_general_options()
    return made


def run(options: argparse.Namespace) -> None:
    """Convert, and print what was written."""
    values = given(options, ConvertOptions)
    missing = [f"--{name}: is missing; expected {what}" for name, what in (("to", "gguf or peft"), ("out", "a file"))
               if name not in values]
    if not missing and not values.keys() & {"model", "adapter"}:
        missing.append("--model: is missing; expected a model folder, or --adapter")
    if values.get("to") == "peft" and "adapter" not in values:
        missing.append("--adapter: is missing; expected the adapter to write for PEFT")
    if missing:
        raise UsageError(*missing)
    config = build(ConvertOptions, values)
    as_json = bool(vars(options).get("json"))
    if config.to == "peft":
        _to_peft(config, as_json)
        return
    report, model = _to_gguf(config)
    written = _write_modelfile(config, model) if config.modelfile else None
    if as_json:
        print_json(report.to_dict() | {"modelfile": None if written is None else str(written)})
    else:
        show(report, written)


def show(report: ConvertReport, written: Path | None) -> None:
    """What was written, in a few lines."""
    from deltaw.train.summary import size

    print(f"{report.out}: {report.kind} of {report.architecture}, {report.tensors} tensors in {report.dtype}, "
          f"{size(report.bytes)}")
    if report.tokenizer:
        print(f"tokenizer: {report.tokenizer}")
    if report.rescaled:
        print(f"{report.rescaled} factors carry a scale of their own beside alpha {report.alpha:g}")
    if written is not None:
        print(f"{written}: `ollama create NAME -f {written}`")


def _to_gguf(config: ConvertOptions) -> tuple[ConvertReport, str]:
    from deltaw.convert import adapter_to_gguf, model_to_gguf

    out = Path(config.out).expanduser()
    if config.adapter is None:
        assert config.model is not None
        return model_to_gguf(config.model, out, dtype=config.dtype or "f16", tokenizer=config.tokenizer,
                             overwrite=config.overwrite), config.model
    adapter = read_adapter(config.adapter)
    model = config.model or recorded_base({"adapter": adapter})
    return adapter_to_gguf(adapter, out, model=model, dtype=config.dtype or "f32", overwrite=config.overwrite), model


def _to_peft(config: ConvertOptions, as_json: bool) -> None:
    """An adapter written anew, as PEFT's current form has it."""
    assert config.adapter is not None
    out = Path(config.out).expanduser()
    if out.exists() and not config.overwrite:
        raise ConfigError(Fault(f"out '{out}'", "exists", "a new folder", "Choose another, or pass --overwrite"))
    adapter = read_adapter(config.adapter)
    adapter.save(out)
    if as_json:
        print_json({"out": str(out), "kind": "adapter", "to": "peft", "sites": len(adapter.sites)})
    else:
        print(f"{out}: {len(adapter.sites)} sites")


def _write_modelfile(config: ConvertOptions, model: str) -> Path:
    """The Modelfile beside the GGUF file, atomically."""
    from deltaw.bases.load import load_tokenizer
    from deltaw.convert import modelfile

    out = Path(config.out).expanduser()
    path = out.parent / MODELFILE
    if path.exists() and not config.overwrite:
        raise ConfigError(Fault(f"'{path}'", "exists", "a new file", "Move it away, or pass --overwrite"))
    tokenizer = load_tokenizer(model)
    base = config.base_gguf or ("base.gguf" if config.adapter else out.name)
    text = modelfile(tokenizer, base=base, adapter=out.name if config.adapter else None)
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    return path
