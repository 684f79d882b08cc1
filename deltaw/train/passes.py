"""The passes of one round: which micro-batches go together, and what each job gets of losses and time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from deltaw.bases.packed_attention import PLACES
from deltaw.switch import Switchboard
from deltaw.train.job import ActiveJob
from deltaw.train.joint import Piece, joint_backward
from deltaw.train.objective import CausalLoss
from deltaw.train.scheduler import fill

Failing = Callable[[ActiveJob], AbstractContextManager[None]]
"""Within it what goes wrong ends one job, and no other."""


def gradients(board: Switchboard, chosen: Sequence[ActiveJob], budget: int,
              failing: Failing) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Every chosen job's gradient in place; its losses, and its share of the time by tokens."""
    losses: dict[str, list[float]] = {job.name: [] for job in chosen}
    seconds = dict.fromkeys(losses, 0.0)
    shares = {job.name for job in chosen if not job.why_apart and
              all(PLACES in batch.inputs for batch in job.draw().batches)}
    for job in (job for job in chosen if job.name not in shares):
        began = time.perf_counter()
        with failing(job):
            losses[job.name] = [job.backward_alone(i) for i in range(len(job.draw().batches))]
        seconds[job.name] += time.perf_counter() - began
    pieces = [(job, number) for job in sorted(chosen, key=_width) if job.name in shares
              for number in range(len(job.draw().batches))]
    sizes = [job.draw().batches[number].tokens for job, number in pieces]
    for members in fill(sizes, budget):
        began = time.perf_counter()
        together = [pieces[i] for i in members]
        for (job, _), loss in zip(together, _one_pass(board, together, failing), strict=True):
            losses[job.name].append(loss)
        spent, whole = time.perf_counter() - began, sum(sizes[i] for i in members)
        for i in members:
            seconds[pieces[i][0].name] += spent * sizes[i] / whole
    return losses, seconds


def _width(job: ActiveJob) -> int:
    """What a job's factors are padded to beside its neighbours'; those of like width lie side by side."""
    return job.job.config.lora.r


def _one_pass(board: Switchboard, pieces: Sequence[tuple[ActiveJob, int]], failing: Failing) -> list[float]:
    """The losses of one pass, computed as in a run alone where all its micro-batches are one job's."""
    if len({job.name for job, _ in pieces}) == 1:
        return [_alone(job, number, failing) for job, number in pieces]
    parts = []
    for job, number in pieces:
        objective, drawn = job.session.objective, job.draw()
        assert isinstance(objective, CausalLoss)
        parts.append(Piece(job.name, drawn.batches[number].inputs, objective, drawn.units, job.generator))
    return joint_backward(board, parts)


def _alone(job: ActiveJob, number: int, failing: Failing) -> float:
    loss = float("nan")
    if job.status == "running":
        with failing(job):
            loss = job.backward_alone(number)
    return loss
