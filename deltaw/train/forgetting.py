"""How much of the base's language an adapter costs: loss on general text without it and with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from deltaw.train.evaluation import evaluate

if TYPE_CHECKING:
    from deltaw.data import EncodedData
    from deltaw.switch import Switchboard


@dataclass(frozen=True, kw_only=True)
class Forgetting:
    """The base's mean loss of a token on general text, and an adapter's on the same tokens."""

    adapter: str
    before: float
    """Without any adapter, in nats."""
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


def measure_forgetting(board: Switchboard, model: Any, tokenizer: Any, text: EncodedData, names: Sequence[str], *,
                       rows: int | None = None, batch_size: int = 4) -> tuple[Forgetting, ...]:
    """The loss of `text` (its first `rows` examples) with every adapter off, then with each of `names` alone.

    What was on before is on again afterwards.
    """
    chosen = range(len(text))[:rows]
    with board.off():
        base = evaluate(model, tokenizer, text, rows=chosen, batch_size=batch_size)
    before, found = board.active, []
    try:
        for name in names:
            board.use(name)
            with_it = evaluate(model, tokenizer, text, rows=chosen, batch_size=batch_size)
            found.append(Forgetting(adapter=name, before=base.loss, after=with_it.loss, tokens=with_it.units))
    finally:
        board.use(before or None)
    return tuple(found)
