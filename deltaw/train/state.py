"""`State`: where a run stands, apart from its tensors; and the interfaces by which the loop meets its surroundings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from deltaw.bases.packed_attention import PLACES
from deltaw.train.objective import Inputs


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch on the model's device, and where its rows come from ("rows.jsonl:17")."""

    inputs: Inputs
    where: Sequence[str] = ()

    @property
    def tokens(self) -> int:
        """Tokens read, without padding; rows where the batch holds no tokens."""
        if PLACES in self.inputs:
            return self.inputs["input_ids"].numel()
        mask = self.inputs.get("attention_mask")
        return int(mask.sum()) if mask is not None else len(self.inputs["labels"])


class Batches(Protocol):
    """An endless stream of micro-batches that can be left and taken up again at the same place."""

    def __next__(self) -> Batch:
        """The next micro-batch."""

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position that `state_dict` gave."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """When things happen in a run: worked out from the config and the size of the data."""

    steps: int
    """Optimizer steps in all."""
    rate: Callable[[int], float]
    """The learning rate of each step, counted from 0."""
    accumulate: int = 1
    """Micro-batches in a step."""
    max_grad_norm: float = 0.0
    """Length to which the gradient is cut; 0 leaves it."""
    eval_every: int = 0
    """Steps between evaluations; 0 for none."""
    save_every: int = 0
    """Steps between checkpoints; 0 for none."""
    keep_best: str | None = None
    """The figure of an evaluation that decides which step was best: "loss" (lower is better) or another (higher)."""
    release_memory: bool = False
    """Whether freed memory is given back to the system after each step."""
    patience: int | None = None
    """Evaluations in a row without a better figure after which the run stops."""


@dataclass
class State:
    """What a checkpoint holds beside tensors. A fresh one is the start of a run."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens read so far, without padding."""
    units: int = 0
    """Supervised tokens (or rows) learned from so far."""
    seconds: float = 0.0
    """Time spent so far, over all resumptions."""
    best: float | None = None
    """The best figure so far."""
    best_step: int | None = None
    """The step of the best figure."""
    waited: int = 0
    """Evaluations in a row without a better figure."""
    best_tensors: dict[str, Tensor] = field(default_factory=dict)
    """Copies of the tuning's tensors at the best figure."""

    def counters(self) -> dict[str, Any]:
        """All but the tensors, as JSON values."""
        return {name: value for name, value in vars(self).items() if name != "best_tensors"}


class Watch(Protocol):
    """Whoever wants to know how the run goes."""

    def step(self, state: State, *, loss: float, rate: float, norm: float) -> None:
        """A step was done."""

    def evaluated(self, state: State, figures: Mapping[str, float]) -> None:
        """An evaluation was done, with these figures."""
