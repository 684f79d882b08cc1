"""Rows of the LoRA paper's tables (Hu et al. 2021, arXiv 2106.09685v2), to stand beside one's own.

Models and budgets differ: what can be compared is the order of the methods and the distances between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Published:
    """One row of a published table."""

    model: str
    """The base of that row."""
    method: str
    """Our name of its method."""
    parameters: float
    """Trained values, as printed."""
    figures: Mapping[str, float]
    """Its figures by our names of the metrics."""
    spread: Mapping[str, float]
    """The ± printed beside them, where there is one."""


@dataclass(frozen=True, slots=True)
class Table:
    """A published table."""

    title: str
    rows: tuple[Published, ...]


def _rows(model: str, names: tuple[str, ...], *rows: tuple[str, float, tuple[float, ...], tuple[float, ...]]
          ) -> tuple[Published, ...]:
    return tuple(Published(model, method, parameters, dict(zip(names, values, strict=True)),
                           dict(zip(names, spread, strict=True)) if spread else {})
                 for method, parameters, values, spread in rows)


_E2E = ("bleu", "nist", "meteor", "rougeL", "cider")
_TABLE_3 = Table("LoRA paper, Table 3: E2E NLG", _rows(
    "GPT-2 M", _E2E,
    ("full", 354.92e6, (68.2, 8.62, 46.2, 71.0, 2.47), ()),
    ("adapter-l", 0.37e6, (66.3, 8.41, 45.0, 69.8, 2.40), ()),
    ("adapter-l", 11.09e6, (68.9, 8.71, 46.1, 71.3, 2.47), ()),
    ("adapter-h", 11.09e6, (67.3, 8.50, 46.0, 70.7, 2.44), (0.6, 0.07, 0.2, 0.2, 0.01)),
    ("ft-top-k", 25.19e6, (68.1, 8.59, 46.0, 70.8, 2.41), ()),
    ("prelayer", 0.35e6, (69.7, 8.81, 46.1, 71.4, 2.49), ()),
    ("lora", 0.35e6, (70.4, 8.85, 46.8, 71.8, 2.53), (0.1, 0.02, 0.2, 0.1, 0.02)),
) + _rows(
    "GPT-2 L", _E2E,
    ("full", 774.03e6, (68.5, 8.78, 46.0, 69.9, 2.45), ()),
    ("adapter-l", 0.88e6, (69.1, 8.68, 46.3, 71.4, 2.49), (0.1, 0.03, 0.0, 0.2, 0.0)),
    ("adapter-l", 23.00e6, (68.9, 8.70, 46.1, 71.3, 2.45), (0.3, 0.04, 0.1, 0.2, 0.02)),
    ("prelayer", 0.77e6, (70.3, 8.85, 46.2, 71.7, 2.47), ()),
    ("lora", 0.77e6, (70.4, 8.89, 46.8, 72.0, 2.47), (0.1, 0.02, 0.2, 0.2, 0.02)),
))
_TABLE_2 = Table("LoRA paper, Table 2: SST-2 († as Houlsby et al. trained: one batch size, 128 tokens)", _rows(
    "RoBERTa base", ("accuracy",),
    ("full", 125.0e6, (94.8,), ()),
    ("bitfit", 0.1e6, (93.7,), ()),
    ("adapter-d", 0.3e6, (94.2,), (0.1,)),
    ("adapter-d", 0.9e6, (94.7,), (0.3,)),
    ("lora", 0.3e6, (95.1,), (0.2,)),
) + _rows(
    "RoBERTa large", ("accuracy",),
    ("full", 355.0e6, (96.4,), ()),
    ("lora", 0.8e6, (96.2,), (0.5,)),
) + _rows(
    "RoBERTa large †", ("accuracy",),
    ("adapter-p", 3.0e6, (96.1,), (0.3,)),
    ("adapter-p", 0.8e6, (96.6,), (0.2,)),
    ("adapter-h", 6.0e6, (96.2,), (0.3,)),
    ("adapter-h", 0.8e6, (96.3,), (0.5,)),
    ("lora", 0.8e6, (96.2,), (0.5,)),
) + _rows(
    "DeBERTa XXL", ("accuracy",),
    ("full", 1500.0e6, (97.2,), ()),
    ("lora", 4.7e6, (96.9,), (0.2,)),
))
_TABLE_4 = Table("LoRA paper, Table 4: WikiSQL", _rows(
    "GPT-3 175B", ("logical_form",),
    ("full", 175_255.8e6, (73.8,), (0.5,)),
    ("bitfit", 14.2e6, (71.3,), (0.5,)),
    ("preembed", 3.2e6, (63.1,), (0.5,)),
    ("prelayer", 20.2e6, (70.1,), (0.5,)),
    ("adapter-h", 7.1e6, (71.9,), (0.5,)),
    ("adapter-h", 40.1e6, (73.2,), (0.5,)),
    ("lora", 4.7e6, (73.4,), (0.5,)),
    ("lora", 37.7e6, (74.0,), (0.5,)),
))

TABLES: Mapping[str, Table] = {"e2e": _TABLE_3, "sst2": _TABLE_2, "wikisql": _TABLE_4}
"""The published table of each task."""

LOW_DATA = Table("LoRA paper, Table 16: MNLI-m with few examples, GPT-3 175B", tuple(
    Published("GPT-3 175B", method, 0.0, dict(zip(("100", "1k", "10k", "392k"), values, strict=True)), {})
    for method, values in (("full", (60.2, 85.8, 88.9, 89.5)), ("preembed", (37.6, 75.2, 79.5, 88.6)),
                           ("prelayer", (48.3, 82.5, 85.9, 89.6)), ("lora", (63.8, 85.6, 89.2, 91.7)))))
"""Accuracy by number of training examples."""


@dataclass(frozen=True, slots=True)
class Grid:
    """A published table whose columns are points of a sweep."""

    title: str
    columns: tuple[str, ...]
    rows: Mapping[str, tuple[float, ...]]


_SETS = ("Wq, r=8", "Wk, r=8", "Wv, r=8", "Wo, r=8", "Wq,Wk, r=4", "Wq,Wv, r=4", "all four, r=2")
_RANKS = ("r=1", "r=2", "r=4", "r=8", "r=64")
_TABLE_5 = "LoRA paper, Table 5: which matrices, 18 million values, GPT-3 175B"
_TABLE_6 = "LoRA paper, Table 6: the rank, GPT-3 175B"
SWEEPS: Mapping[str, tuple[Grid, ...]] = {
    "wikisql": (
        Grid(_TABLE_5, _SETS, {"WikiSQL": (70.4, 70.0, 73.0, 73.2, 71.4, 73.7, 73.7)}),
        Grid(_TABLE_6, _RANKS, {"Wq": (68.8, 69.6, 70.5, 70.4, 70.0), "Wq,Wv": (73.4, 73.3, 73.7, 73.8, 73.5),
                                "Wq,Wk,Wv,Wo": (74.1, 73.7, 74.0, 74.0, 73.9)})),
    "mnli": (
        Grid(_TABLE_5, _SETS, {"MNLI": (91.0, 90.8, 91.0, 91.3, 91.3, 91.3, 91.7)}),
        Grid(_TABLE_6, _RANKS, {"Wq": (90.7, 90.9, 91.1, 90.7, 90.7), "Wq,Wv": (91.3, 91.4, 91.3, 91.6, 91.4),
                                "Wq,Wk,Wv,Wo": (91.2, 91.7, 91.7, 91.5, 91.4)})),
    "e2e": (Grid(
        "LoRA paper, Table 18: the rank, GPT-2 M on E2E NLG", ("loss", *_E2E), {
            "r=1": (1.23, 68.72, 8.7215, 0.4565, 0.7052, 2.4329), "r=2": (1.21, 69.17, 8.7413, 0.4590, 0.7052, 2.4639),
            "r=4": (1.18, 70.38, 8.8439, 0.4689, 0.7186, 2.5349), "r=8": (1.17, 69.57, 8.7457, 0.4636, 0.7196, 2.5196),
            "r=16": (1.16, 69.61, 8.7483, 0.4629, 0.7177, 2.4985),
            "r=32": (1.16, 69.33, 8.7736, 0.4642, 0.7105, 2.5255),
            "r=64": (1.16, 69.24, 8.7174, 0.4651, 0.7180, 2.5070),
            "r=128": (1.16, 68.73, 8.6718, 0.4628, 0.7127, 2.5030),
            "r=256": (1.16, 68.92, 8.6982, 0.4629, 0.7128, 2.5012),
            "r=512": (1.16, 68.78, 8.6857, 0.4637, 0.7128, 2.5025),
            "r=1024": (1.17, 69.37, 8.7495, 0.4659, 0.7149, 2.5090)}),),
}
"""The published sweeps of each task, in the units in which they are printed."""
