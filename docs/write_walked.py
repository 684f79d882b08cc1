"""Write what walks over the published shapes find, as the package carries it: `python docs/write_walked.py [NAME ...]`.

For each shape: its sizes, the sites of a default LoRA, and a form of the steps of each way of tuning, in bf16 and fp32,
with layers kept and computed again, and in bf16 with kernels in C too. To be run again when the versions of torch or
transformers change, or what a walk does; a test tells. A shape takes about a minute.
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
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from deltaw.core import LoraConfig
from deltaw.errors import BaseModelError
from deltaw.plan import kept
from deltaw.plan.architectures import ARCHITECTURES
from deltaw.plan.config import Method, PlanConfig
from deltaw.plan.fitted import Look, find_forms
from deltaw.plan.forms import At
from deltaw.plan.found import Point
from deltaw.plan.shapes import read_shapes
from deltaw.plan.step import Heard, Steps
from deltaw.plan.walks import Walks

KINDS: tuple[Method, ...] = ("full", "bitfit", "preembed", "lora")
"""The ways of tuning whose steps differ."""


def walked(name: str) -> dict[str, Any]:
    """Answers on a shape by key, all of them new."""
    forms: dict[str, Any] = {}
    with _nothing_kept():
        for dtype in ("bfloat16", "float32"):
            for task in ("causal-lm", "seq-cls") if "bert" in name else ("causal-lm",):
                with suppress(BaseModelError):  # DeBERTa writes no text
                    forms |= _ask(PlanConfig(model=name, task=task), dtype)  # type: ignore[arg-type]
        files = sorted(kept.folder().glob("*.json"))
        answers = {file.stem: json.loads(file.read_text(encoding="utf-8"))["answer"] for file in files}
        return json.loads(json.dumps(answers | forms))  # type: ignore[no-any-return]


def _ask(config: PlanConfig, dtype: str) -> dict[str, Any]:
    """Forms of steps by key; sizes and sites are kept on the way."""
    shapes = read_shapes(config.model, task=config.task, num_labels=config.num_labels)
    walks = Walks(shapes, config, dtype)
    assert walks.network.values
    assert walks.places
    found = {}
    for kernels, mode, kind in product((False, True) if dtype == "bfloat16" else (False,), ("off", "layer"), KINDS):
        under = walks.under(replace(config, gradient_checkpointing=mode))  # type: ignore[arg-type]
        look = _looks(under, kind, kernels=kernels)
        forms = find_forms(look, ranked=kind == "lora", learned=config.task == "causal-lm")
        if forms:
            found[kept.key(under.form_question(kind, kernels=kernels))] = [form.to_json() for form in forms]
    return found


def _looks(walks: Walks, kind: Method, *, kernels: bool) -> Look:
    """Steps at any point."""
    def look(at: At) -> Heard:
        config = replace(walks.config, lora=LoraConfig(r=at.r), supervised=at.S / (at.B * at.T))
        steps = Steps(walks.shapes, config, getattr(torch, walks.dtype), kernels=kernels)
        return steps.heard(Point(kind, at.B, at.T, at.r))

    return cache(look)


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
