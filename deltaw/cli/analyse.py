"""`deltaw analyse`: what one or more adapters change, in figures and sentences, and as a page."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from deltaw.cli.build import build
from deltaw.cli.main import VERBS
from deltaw.cli.models import (
    METAVARS,
    ModelOptions,
    is_classifier,
    mismatches,
    open_model,
    read_adapter,
    read_tuned,
    recorded_base,
)
from deltaw.cli.options import add_options, given
from deltaw.cli.output import print_json, print_table, say
from deltaw.cli.parser import Parser, UsageError
from deltaw.errors import AdapterFileError, ConfigError, DeltawError, Fault

if TYPE_CHECKING:
    from deltaw.analyse import Analysis, BaseWeights
    from deltaw.baselines import SavedBaseline
    from deltaw.core import Adapter
    from deltaw.train.forgetting import Forgetting

EPILOG = """\
Sizes, spectra and what adapters have in common need no base. With --model its weights are read too, one by one:
amplification, W's own directions, intruder dimensions. With --data the model is run on that text, to see what it
forgot; this takes the folders of other methods too, full fine-tuning's beside LoRA's.

  deltaw analyse adapters/r8 adapters/r64 --out analysis.html
  deltaw analyse adapters/mine --model my/base --out analysis.html
  deltaw analyse adapters/mine --model my/base --data general.jsonl --json
  deltaw analyse runs/lora runs/full --data general.txt
"""


@dataclass(frozen=True, kw_only=True)
class AnalyseOptions(ModelOptions):
    """What to look at."""

    data: str | None = None
    """General text, a .txt file or rows with a `text` column: the base's loss on it with and without each adapter."""
    eval_rows: int | None = 100
    """Rows of that text, the first ones; none for all."""
    max_length: int | None = None
    """Longest piece of that text, in tokens; by default 512, or what the model takes."""
    sites: tuple[str, ...] = ()
    """Sites whose directions are drawn; by default the one in the middle layer of each of the first four kinds."""
    top: int = 10
    """How many of the largest directions of W + ΔW may be intruders."""
    epsilon: float = 0.5
    """Such a direction is an intruder when its cosine with each of W's is below this."""
    seed: int = 0
    """Seed of the random comparisons."""
    out: str | None = None
    """File to write the page to."""
    threads: int | None = None
    """CPU threads; by default one for each core."""

    def __post_init__(self) -> None:
        faults = [Fault(f"AnalyseOptions.{name}", f"got {value}", "a whole number >= 1")
                  for name in ("eval_rows", "top", "threads")
                  if (value := getattr(self, name)) is not None and value < 1]
        if self.max_length is not None and self.max_length < 2:
            faults.append(Fault("AnalyseOptions.max_length", f"got {self.max_length}", "a whole number >= 2"))
        if not 0 < self.epsilon < 1:
            faults.append(Fault("AnalyseOptions.epsilon", f"got {self.epsilon}", "0 < epsilon < 1"))
        if self.seed < 0:
            faults.append(Fault("AnalyseOptions.seed", f"got {self.seed}", "a whole number >= 0"))
        if faults:
            raise ConfigError(*faults)


def parser() -> Parser:
    """The adapters, the base and the page."""
    made = Parser("analyse", VERBS["analyse"], epilog=EPILOG,
                  usage="analyse ADAPTER [ADAPTER ...] [--model MODEL] [--data TEXT] [--out FILE] [OPTIONS]")
    made.add_argument_group("The adapters").add_argument("adapters", nargs="*", metavar="ADAPTER",
                                                         help="Folders or Hub ids of adapters of one base.")
    add_options(made, AnalyseOptions, "What to look at",
                metavars={**METAVARS, "data": "TEXT", "out": "FILE", "sites": "NAME,..."})
    made.add_general_options()
    return made


def run(options: argparse.Namespace) -> None:
    """Analyse, write the page, and print what there is to say."""
    config = build(AnalyseOptions, given(options, AnalyseOptions))
    paths = list(vars(options).get("adapters", []))
    if not paths:
        raise UsageError("ADAPTER: is missing; expected the folder or Hub id of at least one adapter")
    if config.threads is not None:
        import torch

        torch.set_num_threads(config.threads)
    adapters = read_all(paths, others=config.data is not None)
    from deltaw.analyse import analyse, findings
    from deltaw.core import Adapter
    from deltaw.report.analysis import analysis_page, describe_forgetting
    from deltaw.report.page import write_page

    low_rank = {name: adapter for name, adapter in adapters.items() if isinstance(adapter, Adapter)}
    weights = open_bases(config, low_rank)
    found = analyse(low_rank, weights, sites=config.sites, top=config.top, epsilon=config.epsilon, seed=config.seed,
                    progress=_progress)
    probed = probe(config, adapters)
    text = Path(config.data).name if config.data else ""
    written = write_page(analysis_page(found, probed, text), config.out) if config.out else None
    said = [f.text for f in findings(found) if f.section != "map"] + [describe_forgetting(p, text) for p in probed]
    if vars(options).get("json"):
        print_json({**found.to_dict(), "forgetting": [p.to_dict() for p in probed], "report": written and str(written),
                    "findings": [f.text for f in findings(found)] + said[len(said) - len(probed):]})
    else:
        show(found, said, written)


def read_all(paths: Sequence[str], *, others: bool) -> dict[str, Adapter | SavedBaseline]:
    """The adapters by the parts of their paths that tell them apart, and with `others` what other methods saved.

    All faults at once.
    """
    read, faults = dict[str, "Adapter | SavedBaseline"](), list[Fault | str]()
    for path in dict.fromkeys(paths):
        try:
            read[path] = read_tuned(path) if others else read_adapter(path, "--data TEXT measures what it forgot; "
                                                                      "what it changes is no product of factors")
        except AdapterFileError as error:
            faults += error.faults
    if faults:
        raise AdapterFileError(*faults)
    return dict(zip(short_names(list(read)), read.values(), strict=True))


def short_names(paths: Sequence[str]) -> list[str]:
    """The parts of different paths that tell them apart, counted from the end: the name alone of a single one.

    >>> short_names(["runs/r=8/all/seed-0/adapter", "runs/r=64/all/seed-1/adapter"])
    ['r=8/seed-0', 'r=64/seed-1']
    """
    parts = [Path(path).parts for path in paths]
    if len(parts) == 1:
        return [parts[0][-1]]
    shared = {n for n in range(1, 1 + max(map(len, parts), default=0)) if len({p[-n:][:1] for p in parts}) == 1}
    short = ["/".join(part for n, part in zip(range(len(p), 0, -1), p, strict=True) if n not in shared) for p in parts]
    return short if all(short) and len(set(short)) == len(short) else ["/".join(p) for p in parts]


def open_bases(config: AnalyseOptions, adapters: Mapping[str, Adapter]) -> dict[str, BaseWeights]:
    """Where the base's weights at each adapter's sites are; nothing without --model. All faults at once."""
    if config.model is None:
        return {}
    from deltaw.analyse import open_weights

    found: dict[str, BaseWeights] = {}
    faults: dict[type[DeltawError], list[Fault | str]] = {}
    for name, adapter in adapters.items():
        try:
            found[name] = open_weights(config.model, adapter, any_base=config.any_base)
        except DeltawError as error:
            faults.setdefault(type(error), []).extend(f"{name}: {fault}" for fault in error.faults)
    for kind, listed in faults.items():
        raise kind(*listed)
    return found


def probe(config: AnalyseOptions, adapters: Mapping[str, Adapter | SavedBaseline]) -> tuple[Forgetting, ...]:
    """The loss on general text without anything and with each of these; nothing without --data."""
    if config.data is None:
        return ()
    if classifiers := [Fault(f"adapter '{name}'", "was trained to choose labels", "an adapter that writes text",
                             "Leave --data away") for name, adapter in adapters.items() if is_classifier(adapter)]:
        raise AdapterFileError(*classifiers)
    from deltaw.data import load_data
    from deltaw.train.forgetting import measure_forgetting

    source = config.model or recorded_base(adapters)
    say(f"running {source} on {config.data}")
    base = open_model(replace(config, model=source), {}).base
    for name, adapter in adapters.items():
        for line in mismatches(adapter, base):
            say(f"warning: '{name}': {line}")
    limit = base.max_positions
    if limit is not None:  # the same text for all: it leaves room for tokens that a method puts before it
        limit -= max(getattr(adapter, "takes_positions", 0) for adapter in adapters.values())
    text = load_data(config.data, tokenizer=base.tokenizer, task="causal-lm", columns={"text": "text"},
                     max_length=config.max_length or min(512, limit or 512), model_limit=limit, train_on="all")
    return measure_forgetting(base.model, base.tokenizer, text, adapters, rows=config.eval_rows,
                              any_base=config.any_base)


def show(found: Analysis, said: Sequence[str], page: Path | None) -> None:
    """A table of the adapters, then the sentences."""
    from statistics import median

    rows = [[s.name, "/".join(map(str, s.ranks)), str(len(s.sites)), f"{s.parameters:,}", f"{s.frobenius:.3g}",
             f"{median(x.effective_rank for x in s.sites):.1f}" if s.sites else "–",
             f"{median(x.factor for x in s.against_base):.3g}" if s.against_base else "–",
             str(sum(i.count for i in s.intruders)) if s.intruders else "–"] for s in found.adapters]
    if rows:
        print_table("ratios at the median site", ["", "rank", "sites", "parameters", "‖ΔW‖", "effective rank",
                                                  "amplification", "intruders"], rows)
    for sentence in said:
        print(f"- {sentence}")
    if page is not None:
        print(f"\nreport  {page}")


def _progress(done: int, total: int) -> None:
    if done == total or done % 50 == 0:
        say(f"{done} of {total} sites")


