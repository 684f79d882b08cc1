"""What a finished run writes down about itself: in the adapter's `deltaw.json` and in `train_result.json`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from deltaw import bases
from deltaw.train.config import TrainConfig
from deltaw.train.examples import Examples
from deltaw.train.result import SiteRow
from deltaw.train.state import State
from deltaw.train.tuning import Attached


def facts(config: TrainConfig, base: bases.Base, examples: Examples, state: State, before: Mapping[str, float],
          after: Mapping[str, float]) -> dict[str, Any]:
    """What travels with the adapter: its base, its template, and how it was made."""
    return {"base_model": base.source, "template": bases.template_hash(base.tokenizer),
            "tokenizer": bases.tokenizer_hash(base.tokenizer),
            **({"quantized": base.quantized} if base.quantized else {}),
            "training": {"config": config.to_dict(), "steps": state.step, "best_step": state.best_step,
                         "tokens": state.tokens, "supervised": state.units, "seconds": round(state.seconds, 1),
                         "data": examples.facts(), "before": dict(before), "after": dict(after),
                         "versions": versions()}}


def improvement(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, str]:
    """Whether the held-out loss fell; told and not judged, since a run may be after something else."""
    word = "fell" if after["loss"] < before["loss"] else "DID NOT FALL"
    return {"held-out": f"the loss {word}: {before['loss']:.4f} before, {after['loss']:.4f} after"}


def site_rows(tuning: Attached) -> tuple[SiteRow, ...]:
    """What is changed, one row for each site."""
    return tuple(SiteRow(row.site, row.kind, row.shape, row.rank, row.parameters) for row in tuning.rows())


def versions() -> dict[str, str]:
    """Versions of what computes a run."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    for package in ("deltaw", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found
