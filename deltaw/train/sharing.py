"""Which jobs of a set can share passes: tried on each job's own examples, once for adapters of one kind."""

from __future__ import annotations

from collections.abc import Iterable

from deltaw.bases import Base
from deltaw.switch import Switchboard
from deltaw.train.job import ActiveJob
from deltaw.train.joint import Piece, draws_in_training, why_apart
from deltaw.train.objective import CausalLoss


class Sharing:
    """Remembers what was found."""

    def __init__(self, base: Base, board: Switchboard, *, packed: bool) -> None:
        self.base, self.board, self.packed = base, board, packed
        self._tried: dict[object, str] = {}
        self._base_draws: bool | None = None

    def why_apart(self, job: ActiveJob, others: Iterable[ActiveJob]) -> str:
        """Why a job cannot share passes; "" where a trial beside a neighbour shows that it can."""
        objective, config = job.session.objective, job.job.config
        if type(objective) is not CausalLoss or objective.every_position:
            return "only language models with the usual loss share passes"
        if not self.packed:
            return "its examples cannot lie end to end on this base"
        redraws = config.lora.lora_dropout > 0 and config.gradient_checkpointing != "off"
        layers = (redraws, config.lora.init_lora_weights,
                  *((target.site.kind, target.site.name) for target in self.board.table(job.name)))
        if layers not in self._tried:
            inputs = job.session.examples.first_batch(self.base).inputs
            if self._base_draws is None:
                self._base_draws = draws_in_training(self.board, inputs)
            if self._base_draws:
                return "the base draws random numbers in training"
            piece = Piece(job.name, inputs, objective, 1)
            beside = next((other.name for other in others if other is not job and not other.why_apart), None)
            self._tried[layers] = why_apart(self.board, piece, Piece(beside, inputs, objective, 1), redraws=redraws,
                                            dtype=self.base.dtype)
        return self._tried[layers]
