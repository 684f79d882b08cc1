"""`Baseline`: a method put on a model. The training loop knows it as a `Tuning`, as it knows LoRA."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from deltaw import bases
from deltaw.baselines.config import BaselineConfig
from deltaw.baselines.lora import LoraPart
from deltaw.baselines.part import Part, Row, fill
from deltaw.baselines.replaced import Replaced
from deltaw.bases.load import TAKEN_POSITIONS
from deltaw.core import LoraConfig
from deltaw.errors import BaseMismatchError, Fault, StateError
from deltaw.switch import Switchboard

_METHOD = "deltaw_method"
"""Attribute of a model that a method is on: its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What a method was made from; written down with its tensors."""

    method: str
    config: BaselineConfig
    lora: LoraConfig
    seed: int


class Baseline:
    """A method on a model: what it trains, what it takes to go back to the base, and its files.

    Made by `deltaw.baselines.METHODS[name](model, config, seed)`.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, build: Callable[[], Iterator[Part]], *,
                 head: Sequence[str] = (), takes: int = 0, packs: bool = True, compiles: bool = True) -> None:
        """`head` names parameters of a head that is new for the task, `takes` counts positions for tokens of its own.

        With `packs` the method goes with rows that hold several examples, with `compiles` with compiled layers.
        """
        if _METHOD in model.__dict__:
            raise StateError(Fault("the model", f"has method {model.__dict__[_METHOD]} on it", "a model without one",
                                   "Call remove() first"))
        self._model, self.recipe, self.head, self.takes = model, recipe, tuple(head), takes
        self.packs, self.compiles = packs, compiles
        self.facts: dict[str, Any] = {}
        named = list(model.named_parameters())
        self._whole = bases.fingerprint(named)
        self._base = bases.fingerprint((name, p) for name, p in named if name not in self.head)
        self._required = [(p, p.requires_grad) for _, p in named]
        self.parts: list[Part] = []
        try:
            for part in build():
                self.parts.append(part)
        except BaseException:
            self._take_off()
            raise
        trained = {id(p) for p in self.parameters().values()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        self._model.__dict__[_METHOD] = recipe.method
        if takes:
            self._model.__dict__[TAKEN_POSITIONS] = takes  # on or off, so that rows which fit always do
        self._on = False
        self._turn(True)

    # -- a Tuning ----------------------------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """The model that the method is on."""
        return self._model

    def parameters(self) -> dict[str, nn.Parameter]:
        """All trained tensors by name."""
        return {name: parameter for part in self.parts for name, parameter in part.parameters().items()}

    def note(self, **facts: Any) -> None:
        """Record facts that are saved with the tensors."""
        self.facts.update(facts)

    def save(self, path: str | Path) -> None:
        """Write the folder: tensors, `tuning.json`, and PEFT's config where PEFT has the same method."""
        from deltaw.baselines.files import save

        save(self, path)

    # -- what is there -----------------------------------------------------------------------------------------------

    def values(self) -> dict[str, Tensor]:
        """What is saved: what was learned, as it is used afterwards, and what another session cannot do without."""
        return {name: tensor for part in self.parts
                for name, tensor in {**part.values(), **part.kept_beside()}.items()}

    def put(self, values: Mapping[str, Tensor]) -> None:
        """Take up saved values; `AdapterFileError` if they are not this method's on this base."""
        expected = self.values()
        if set(values) != set(expected) or any(values[name].shape != expected[name].shape for name in expected):
            fill(expected, values)
        for part in self.parts:
            part.put({name: values[name] for name in {**part.values(), **part.kept_beside()}})

    @property
    def file_names(self) -> tuple[str, ...]:
        """The files that `save` writes."""
        from deltaw.baselines.files import names

        return names(self)

    def count(self, *, head: bool = True) -> int:
        """Values that were learned and are kept; without `head`, as papers count, those of a new head left out."""
        names = set() if head else {*self.head, *self._saved_heads()}
        return sum(value.numel() for part in self.parts for name, value in part.values().items() if name not in names)

    def rows(self) -> list[Row]:
        """What is changed, line by line."""
        return [row for part in self.parts for row in part.rows()]

    def fingerprint(self, *, head: bool = True) -> bases.Fingerprint:
        """What identifies the base's weights as they were before, with or without a new head."""
        return self._whole if head else self._base

    @property
    def board(self) -> Switchboard | None:
        """The switchboard of a LoRA among the parts."""
        return next((part.board for part in self.parts if isinstance(part, LoraPart)), None)

    # -- the base ----------------------------------------------------------------------------------------------------

    @contextmanager
    def off(self) -> Iterator[None]:
        """The base alone, to the bit, for the length of the block."""
        before = self._on
        self._turn(False)
        try:
            yield
        finally:
            self._turn(before)

    @property
    def is_on(self) -> bool:
        """Whether the method takes effect."""
        return self._on

    def use(self, on: bool) -> None:
        """Turn the method on or off."""
        self._turn(on)

    def forget_base(self) -> None:
        """Drop the base's weights where copies of them are trained: less memory, and no way back."""
        for part in self.parts:
            if isinstance(part, Replaced):
                part.forget()

    def remove(self) -> nn.Module:
        """Take everything off and return the model: same modules, same bits, same `requires_grad` as before."""
        self._take_off()
        return self._model

    def _turn(self, on: bool) -> None:
        if on == self._on:
            return
        for part in self.parts:
            part.turn(on)
        self._on = on

    def _take_off(self) -> None:
        if any(isinstance(part, Replaced) and not part.own for part in self.parts):
            raise StateError(Fault("the base", "was forgotten, to save memory", "its own weights", "Load it again"))
        for part in reversed(self.parts):
            part.remove()
        self.parts = []
        for mark in (TAKEN_POSITIONS, _METHOD):
            self._model.__dict__.pop(mark, None)
        for parameter, required in self._required:
            parameter.requires_grad_(required)

    def _saved_heads(self) -> set[str]:
        """Names of a LoRA's copies of the head."""
        board = self.board
        saved = {t.site.name for t in board.table(LoraPart.NAME) if t.site.kind == "saved"} if board else set()
        return {name for name in self.parameters() if any(name.startswith(f"{site}.") for site in saved)}


def check_base(recorded: Mapping[str, Any], tuned: Baseline) -> None:
    """Refuse values that were made on another base, as for an adapter."""
    fault = bases.compare(bases.Fingerprint.from_dict(recorded), tuned.fingerprint(head=False))
    if fault is not None:
        raise BaseMismatchError(fault)
