"""`deltaw merge`: a base and an adapter become a model folder that plain transformers loads."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from deltaw.cli.build import build
from deltaw.cli.main import VERBS
from deltaw.cli.models import METAVARS, read_adapter, recorded_base
from deltaw.cli.options import add_options, given
from deltaw.cli.output import print_json, print_table
from deltaw.cli.parser import Parser, UsageError

if TYPE_CHECKING:
    from deltaw.merge import MergeReport

EPILOG = """\
Files are written one at a time, so that a model larger than memory can be merged, and appear all at once at the end.

  deltaw merge --adapter adapters/mine --out models/mine
  deltaw merge --model my/base --adapter adapters/mine --out models/mine --dtype bf16
  deltaw merge --model models/base-4bit --adapter adapters/mine --out models/mine --into requantized
"""
_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """What to merge, and where to."""

    adapter: str
    """The adapter: its folder or a Hub id."""
    out: str
    """Folder to write the model to."""
    model: str | None = None
    """The base: a Hub id, a local folder, a GGUF file or package:NAME; by default the one that the adapter records."""
    into: Literal["16bit", "requantized"] | None = None
    """For a quantized base: 16bit writes its dequantized weights with the change; requantized packs the sum again, and
    tells how much of the change survived. A base of plain numbers is merged into as it is, which loses least."""
    least_survival: float = 0.5
    """Refuse a requantized merge of which less than this share of the change survives."""
    force: bool = False
    """Merge although less than that survives."""
    dtype: str | None = None
    """Number format of the merged model: bf16, fp32, fp16; by default that of the base's files."""
    any_base: bool = False
    """Merge although the adapter was made for another base of the same shapes."""
    overwrite: bool = False
    """Replace a model folder that is already at `out`."""


def parser() -> Parser:
    """The base, the adapter and the folder."""
    made = Parser("merge", VERBS["merge"], usage="merge [--model MODEL] --adapter FOLDER --out FOLDER [OPTIONS]",
                  epilog=EPILOG)
    add_options(made, MergeOptions, "What to merge", metavars={**METAVARS, "out": "FOLDER", "dtype": "bf16|fp32|fp16",
                                                               "into": "16bit|requantized"})
    made.add_general_options()
    return made


def run(options: argparse.Namespace) -> None:
    """Merge, and print what changed."""
    values = given(options, MergeOptions)
    missing = [f"--{name}: is missing; expected a folder" for name in ("adapter", "out") if name not in values]
    if missing:
        raise UsageError(*missing)
    config = build(MergeOptions, values)
    adapter = read_adapter(config.adapter)
    from deltaw.merge import merge_files

    base, out = config.model or recorded_base({"adapter": adapter}), Path(config.out).expanduser()
    with _Bar() as bar:
        report = merge_files(base, adapter, out, into=config.into, dtype=config.dtype, any_base=config.any_base,
                             overwrite=config.overwrite, least_survival=config.least_survival, force=config.force,
                             progress=bar.at)
    if vars(options).get("json"):
        print_json(report.to_dict())
    else:
        show(report)


def show(report: MergeReport) -> None:
    """The report as a table: the tensors that changed most, and totals."""
    from deltaw.train.summary import size

    _show_survival(report)
    largest = sorted(report.changes, key=lambda change: -change.largest)[:_SHOWN]
    print_table(f"{len(report.changes)} of {report.tensors} tensors changed; the largest changes:",
                ["tensor", "largest |ΔW|", "values changed", "lost by rounding"],
                [[change.tensor, f"{change.largest:.2e}", f"{change.changed / max(1, change.entries):.1%}",
                  f"{change.lost:.2%}"] for change in largest])
    print(f"{report.out_dir}: {size(report.bytes)} in {report.seconds:.1f} s; base checked by: {report.base_check}")
    print(f"Merged into {_WEIGHTS[report.weights].format(report.quantization)}.")
    if report.untied:
        print("The input and output embeddings differ now: the config says tie_word_embeddings: false.")


_WEIGHTS = {
    "original": "the floating-point weights of the folder that was given",
    "dequantized": "the dequantized weights of a base in {}: they differ from the original ones, as rounding left them",
    "requantized": "the weights of a base in {}, packed again in the same way",
}


def _show_survival(report: MergeReport) -> None:
    """The tensors of which the least survived packing, and all of them together."""
    from deltaw.core.survival import worst

    if report.survived is not None:
        print_table(f"{report.survived:.1%} of the change survived rounding to {report.quantization}; the least of:",
                    ["tensor", "survived", "‖error‖ / ‖ΔW‖"],
                    [[change.tensor, f"{change.survived:.1%}", f"{change.lost:.2f}"] for change
                     in worst(report.changes, _SHOWN)])


class _Bar:
    """A progress bar on stderr over the bytes that are written; nothing where stderr is no terminal."""

    def __enter__(self) -> _Bar:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._bar = Progress(TextColumn("merging"), BarColumn(), DownloadColumn(), TimeRemainingColumn(),
                             console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("merging", total=None)
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def at(self, done: int, total: int) -> None:
        """Show that so many bytes of so many are written."""
        self._bar.update(self._task, completed=done, total=total)
