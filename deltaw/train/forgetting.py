"""How much of the base's language a tuning costs: loss on general text without it and with it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from deltaw.core import Adapter
from deltaw.switch import attach, detach
from deltaw.train.evaluation import evaluate

if TYPE_CHECKING:
    from deltaw.baselines import SavedBaseline
    from deltaw.data import EncodedData


@dataclass(frozen=True, kw_only=True)
class Forgetting:
    """The base's mean loss of a token on general text, and a tuned model's on the same tokens."""

    adapter: str
    """The name of what was tuned: an adapter, or another method's folder."""
    before: float
    """Without anything on, in nats."""
    after: float
    """With this one on."""
    tokens: int
    """Tokens that were predicted."""

    @property
    def perplexities(self) -> tuple[float, float]:
        """exp(loss), before and after."""
        return math.exp(self.before), math.exp(self.after)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "perplexity_before": self.perplexities[0], "perplexity_after": self.perplexities[1]}


def measure_forgetting(model: Any, tokenizer: Any, text: EncodedData, changes: Mapping[str, Adapter | SavedBaseline], *,
                       rows: int | None = None, batch_size: int = 4, any_base: bool = False) -> tuple[Forgetting, ...]:
    """The loss of `text` (its first `rows` examples) on a plain base, then with each of `changes` alone on it.

    They are adapters and what other methods saved, by name. The base is as it was afterwards, to the bit. Raises
    BaseMismatchError for what was made on another base, unless `any_base`.
    """
    chosen = range(len(text))[:rows]
    base = evaluate(model, tokenizer, text, rows=chosen, batch_size=batch_size)
    found = []
    for name, change in changes.items():
        with _on(model, change, any_base):
            with_it = evaluate(model, tokenizer, text, rows=chosen, batch_size=batch_size)
        found.append(Forgetting(adapter=name, before=base.loss, after=with_it.loss, tokens=with_it.units))
    return tuple(found)


@contextmanager
def _on(model: Any, change: Adapter | SavedBaseline, any_base: bool) -> Iterator[None]:
    """The model with this on it, for the length of the block."""
    if isinstance(change, Adapter):
        attach(model, change, "adapter", any_base=any_base)
        try:
            yield
        finally:
            detach(model)
    else:
        tuned = change.put_on(model, any_base=any_base)
        try:
            yield
        finally:
            tuned.remove()
