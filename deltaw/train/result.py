"""`TrainResult`: what a run was, did and cost; plain values that a table, a page or `--json` shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Answer:
    """A held-out example, and what was answered before and after training."""

    prompt: str
    expected: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class SiteRow:
    """One place that the adapter changes."""

    site: str
    kind: str
    shape: tuple[int, ...]
    rank: int
    parameters: int


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A finished run. `write_report` makes a page of it, `to_dict` one JSON object."""

    adapter: str
    """The adapter's folder."""
    base: str
    """The base, as it was asked for."""
    config: Mapping[str, Any]
    """The run's config."""
    steps: int
    """Optimizer steps done."""
    planned_steps: int
    """Optimizer steps planned; more than `steps` after an early stop."""
    best_step: int | None
    """The step whose tensors were kept; None where those of the last were."""
    before: Mapping[str, float]
    """Held-out figures of the base."""
    after: Mapping[str, float]
    """Held-out figures of the adapter that was kept."""
    answers: tuple[Answer, ...] = ()
    """Sample answers before and after."""
    curve: tuple[Mapping[str, Any], ...] = ()
    """The rows of `metrics.jsonl`."""
    sites: tuple[SiteRow, ...] = ()
    """What the adapter changes."""
    checks: Mapping[str, str] = field(default_factory=dict)
    """What the doctor looked at, and what it found."""
    plain_layers: Mapping[str, int] = field(default_factory=dict)
    """Adapted linear layers that trained in plain operations instead of fused ones: how many, by reason."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Rows, tokens and what was left out."""
    trained_parameters: int = 0
    """Values that were trained."""
    base_parameters: int = 0
    """Values of the base, which stayed as they were."""
    adapter_bytes: int = 0
    """Size of the adapter's files."""
    tokens: int = 0
    """Tokens read in training, without padding."""
    train_seconds: float = 0.0
    """Time in training steps."""
    total_seconds: float = 0.0
    """Time of the whole run, with loading and evaluation; of the last part of a resumed run."""
    peak_memory: int = 0
    """The most bytes held: of the GPU where one was used, else of the process."""
    precision: str = ""
    """Number format of the base, and why."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of what computed it."""

    @property
    def tokens_per_second(self) -> float:
        """Training speed."""
        return self.tokens / self.train_seconds if self.train_seconds else 0.0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainResult:
        """The result that `to_dict` gave."""
        known = {field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values}
        sites = tuple(SiteRow(**{**row, "shape": tuple(row["shape"])}) for row in known.pop("sites", ()))
        answers = tuple(Answer(**row) for row in known.pop("answers", ()))
        return cls(**known | {"curve": tuple(known.get("curve", ())), "sites": sites, "answers": answers})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self) | {"tokens_per_second": self.tokens_per_second}
