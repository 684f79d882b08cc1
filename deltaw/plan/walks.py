"""What a plan asks of a base: answered from what is kept, and else by laying the base out and running a step on it.

A question is everything that its answer depends on: the base's config, the number format, and the options that a step
looks at. Importing torch and transformers takes most of a plan's time, and only an answer that is not kept needs them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from deltaw.core.config import LoraConfig
from deltaw.plan.config import Method, PlanConfig
from deltaw.plan.forms import At, read_step
from deltaw.plan.found import Network, Place, Point, Step
from deltaw.plan.kept import keep, recall, recall_shipped
from deltaw.plan.shapes import Shapes

if TYPE_CHECKING:
    from deltaw.plan.survey import Survey

_Found = TypeVar("_Found")


class Walks:
    """The network, the sites and the steps of one base under one config; each is found once."""

    def __init__(self, shapes: Shapes, config: PlanConfig, dtype: str) -> None:
        self.shapes, self.config, self.dtype = shapes, config, dtype
        self._steps: dict[tuple[str, bool, Point], Step] = {}

    def under(self, config: PlanConfig) -> Walks:
        """The same for a config that differs in batch, length and gradient checkpointing only."""
        other = Walks(self.shapes, config, self.dtype)
        other._steps = self._steps
        for name in ("network", "places", "_survey"):
            if name in self.__dict__:
                other.__dict__[name] = self.__dict__[name]
        return other

    @cached_property
    def network(self) -> Network:
        """What the base weighs."""
        return self._answer({"what": "network"}, lambda: self._survey.network().to_json(), Network.from_json)

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """Where the low-rank change goes; warns where the config's ranks are of no use."""
        lora, source = self.config.lora, self.shapes.source

        def look() -> Any:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                return {"places": [p.to_json() for p in self._survey.places(self.config)],
                        "said": [str(w.message) for w in said]}

        plain = self._question({"what": "places", **self._change(_at_any_rank(lora))})
        places = recall_shipped(plain, source, lambda answer: _places_at_rank(answer, lora))
        said: list[str] = []
        if places is None:
            places, said = self._answer({"what": "places", **self._change(lora)}, look, _read_places)
        for message in said:
            warnings.warn(message, stacklevel=2)
        return tuple(places)

    def at(self, method: Method, batch: int, length: int, *, kernels: bool = False) -> Step:
        """A step of this many examples of this length, of the whole network; with `kernels` its work alone."""
        config = self.config
        point = Point.of(method, batch, length, config.lora.r)
        key = (config.gradient_checkpointing, kernels, point)
        if key not in self._steps:
            asked = {"what": "step", "method": point.method, "batch": batch, "length": length,
                     "packing": config.packing, "supervised": config.supervised,
                     "gradient_checkpointing": config.gradient_checkpointing, **_with(kernels=kernels),
                     **self._change(config.lora if point.method == "lora" else None)}
            self._steps[key] = self._formed(point, kernels=kernels) or self._answer(
                asked, lambda: self._survey.step(config, point, kernels=kernels).to_json(), Step.from_json)
        return self._steps[key]

    def _formed(self, point: Point, *, kernels: bool = False) -> Step | None:
        """The step by a form that the package carries; None where it has none that covers this."""
        at = At(point.batch, point.length, point.rank, self.config.supervised_tokens(point.batch, point.length))
        return recall_shipped(self.form_question(point.method, kernels=kernels), self.shapes.source,
                              lambda forms: read_step(forms, at))

    def form_question(self, method: Method, *, kernels: bool = False) -> dict[str, Any]:
        """What a form of steps of this way of tuning depends on."""
        config = self.config
        return self._question({
            "what": "form", "method": method, "packing": config.packing,
            "gradient_checkpointing": config.gradient_checkpointing, **_with(kernels=kernels),
            **self._change(_at_any_rank(config.lora) if method == "lora" else None)})

    def _change(self, lora: LoraConfig | None) -> dict[str, Any]:
        """What is asked of a low-rank change; None of another way of tuning."""
        frozen = {"freeze_a": True} if self.config.freeze_a and lora is not None else {}
        return {"lora": None if lora is None else lora.to_dict(), **frozen}

    def _answer(self, asked: dict[str, Any], look: Callable[[], Any], read: Callable[[Any], _Found]) -> _Found:
        """The answer to a question, read the same way whether it was kept or is new."""
        shapes = self.shapes
        if shapes.gguf is not None:  # its config stands in a file that only transformers reads
            return read(look())
        asked = self._question(asked)
        found = recall(asked, shapes.source, read)
        return read(keep(asked, look())) if found is None else found

    def _question(self, asked: dict[str, Any]) -> dict[str, Any]:
        """All that the answer depends on: what is asked, of this base."""
        shapes = self.shapes
        return asked | {"base": dict(shapes.values), "task": shapes.task, "dtype": self.dtype,
                        "num_labels": shapes.num_labels if shapes.task == "seq-cls" else None}

    @cached_property
    def _survey(self) -> Survey:
        """The base, laid out when it is first asked for."""
        from deltaw.plan.survey import Survey

        return Survey(self.shapes, self.dtype)


def _with(*, kernels: bool) -> dict[str, Any]:
    """A part of a question that asks for a step with kernels."""
    return {"kernels": True} if kernels else {}


def _read_places(answer: Any) -> tuple[list[Place], list[str]]:
    """Sites, and what was said of their ranks."""
    return [Place(*place) for place in answer["places"]], list(map(str, answer["said"]))


def _places_at_rank(answer: Any, lora: LoraConfig) -> list[Place]:
    """Sites that were found for another rank, at the change's own; ValueError where ranks differ or are of no use."""
    places, said = _read_places(answer)
    if said or lora.rank_pattern or any(place.rank and place.most < lora.r for place in places):
        raise ValueError(lora.r)
    return [place._replace(rank=lora.r) if place.rank else place for place in places]


def _at_any_rank(lora: LoraConfig) -> LoraConfig:
    """A change apart from its rank and scale, which decide nothing of its sites and operations."""
    plain = LoraConfig()
    return replace(lora, r=plain.r, lora_alpha=plain.lora_alpha)
