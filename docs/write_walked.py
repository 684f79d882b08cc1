"""Write what walks over the published shapes find, as the package carries it: `python docs/write_walked.py [NAME ...]`.

For each shape: its sizes, the sites of a default LoRA, and a step of each way of tuning at a plan's own batch and
length (and half of it), in bf16 and fp32, with layers kept and computed again. To be run again when the versions of
torch or transformers change, or what a walk does; a test tells.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from deltaw.errors import BaseModelError
from deltaw.plan import kept
from deltaw.plan.architectures import ARCHITECTURES
from deltaw.plan.config import Method, PlanConfig
from deltaw.plan.shapes import read_shapes
from deltaw.plan.walks import Walks

KINDS: tuple[Method, ...] = ("full", "bitfit", "preembed", "lora")
"""The ways of tuning whose steps differ."""


def walked(name: str) -> dict[str, Any]:
    """Answers on a shape by key, all of them new."""
    with _nothing_kept():
        for dtype in ("bfloat16", "float32"):
            for task in ("causal-lm", "seq-cls") if "bert" in name else ("causal-lm",):
                with suppress(BaseModelError):  # DeBERTa writes no text
                    _ask(PlanConfig(model=name, task=task), dtype)  # type: ignore[arg-type]
        files = sorted(kept.folder().glob("*.json"))
        return {file.stem: json.loads(file.read_text(encoding="utf-8"))["answer"] for file in files}


def _ask(config: PlanConfig, dtype: str) -> None:
    walks = Walks(read_shapes(config.model, task=config.task, num_labels=config.num_labels), config, dtype)
    assert walks.network.values
    assert walks.places
    for mode in ("off", "layer"):
        under = walks.under(replace(config, gradient_checkpointing=mode))  # type: ignore[arg-type]
        for kind in KINDS:
            for length in (config.max_length, config.max_length // 2):
                with suppress(BaseModelError):  # a step that cannot be followed has no answer
                    under.at(kind, config.batch_size, length)


@contextmanager
def _nothing_kept() -> Iterator[None]:
    """A home without answers, and a package without any."""
    home, there = os.environ.get("DELTAW_HOME"), kept.WALKED
    with tempfile.TemporaryDirectory() as empty:
        os.environ["DELTAW_HOME"], kept.WALKED = empty, Path(empty)
        kept.shipped.cache_clear()
        try:
            yield
        finally:
            kept.WALKED = there
            kept.shipped.cache_clear()
            os.environ.pop("DELTAW_HOME")
            if home is not None:
                os.environ["DELTAW_HOME"] = home


def write(name: str, answers: Mapping[str, Any]) -> None:
    """The shape's file; the same bytes for the same answers."""
    facts = {"by": kept.versions(), "answers": answers}
    text = json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()
    (kept.WALKED / f"{name}.json.gz").write_bytes(gzip.compress(text, mtime=0))


if __name__ == "__main__":
    kept.WALKED.mkdir(exist_ok=True)
    for shape in sys.argv[1:] or ARCHITECTURES:
        write(shape, walked(shape))
        print(shape, (kept.WALKED / f"{shape}.json.gz").stat().st_size, "bytes")
