"""The training loop. Every run of deltaw is a `Run`; `Run.go` reads from top to bottom.

    for each step:
        sum the loss over the step's supervised units, divide by their number, differentiate
        clip, update, watch

Many runs over one base take the same steps, with their gradients from one pass (`deltaw.train.many`). The loop knows no
adapter, no file and no command line: a `Tuning` says what is trained, an `Objective` what is minimised.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from deltaw.train.checkpoint import Checkpoints
from deltaw.train.doctor import Doctor
from deltaw.train.interrupt import Interrupt, TrainInterrupted
from deltaw.train.memory import give_back, settled
from deltaw.train.objective import Objective
from deltaw.train.optimizer import take_step
from deltaw.train.row_adamw import gradient_norm
from deltaw.train.state import Batch, Batches, Pace, State, Watch
from deltaw.train.tuning import Tuning


@dataclass(kw_only=True)
class Run:
    """What one run consists of, and its steps: `draw`, the losses' gradients, `settle`."""

    tuning: Tuning
    objective: Objective
    batches: Batches
    optimizer: torch.optim.Optimizer
    pace: Pace
    state: State
    doctor: Doctor
    evaluate: Callable[[], Mapping[str, float]] | None = None
    """The held-out figures; called with the model in evaluation mode."""
    watch: Watch | None = None
    checkpoints: Checkpoints | None = None

    def start(self) -> None:
        """Look at what is trainable, and clear old gradients."""
        self.doctor.start()
        self.optimizer.zero_grad(set_to_none=True)

    @cached_property
    def parameters(self) -> list[torch.nn.Parameter]:
        """All that is trained."""
        return list(self.tuning.parameters().values())

    @property
    def is_done(self) -> bool:
        """Whether all steps are done, or patience is out."""
        return self.state.step >= self.pace.steps or out_of_patience(self.state, self.pace)

    def draw(self) -> Draw:
        """The micro-batches of the next step."""
        batches = [next(self.batches) for _ in range(self.pace.accumulate)]
        units = sum(self.objective.units(batch.inputs) for batch in batches)
        self.doctor.check_units(self.state.step + 1, units, [batch.where for batch in batches])
        return Draw(batches, units)

    def settle(self, drawn: Draw, losses: Sequence[float], seconds: Callable[[], float]) -> None:
        """Take the step whose gradients are there: check, clip, update, count, watch, evaluate."""
        pace, state = self.pace, self.state
        self.doctor.check_loss(state.step + 1, losses, [batch.where for batch in drawn.batches])
        total_norm = gradient_norm(self.optimizer, self.parameters)
        norm, rate = float(total_norm), pace.rate(state.step)
        self.doctor.check_gradients(state.step + 1, rate, norm)

        take_step(self.optimizer, rate, norm=total_norm, longest=pace.max_grad_norm)

        state.step += 1
        state.units += drawn.units
        state.tokens += drawn.tokens
        state.seconds += seconds()
        self.doctor.check_movement(state.step, rate)
        if self.watch is not None:
            self.watch.step(state, loss=sum(losses), rate=rate, norm=norm)
        if self.evaluate is not None and due(pace.eval_every, state.step):
            judge(state, self.tuning, self.evaluate, pace, self.watch)

    def save(self) -> Path | None:
        """Write a checkpoint, where they are kept."""
        return None if self.checkpoints is None else self.checkpoints.save(self.state, self.tuning, self.optimizer,
                                                                           self.batches)

    def go(self) -> State:
        """All steps, one after the other; see `fit`."""
        self.start()
        self.tuning.model.train()
        with Interrupt() as interrupt, settled():
            while not self.is_done:
                began = time.perf_counter()
                drawn = self.draw()
                losses = [backward(self.tuning, self.objective, batch, drawn.units) for batch in drawn.batches]
                if self.pace.release_memory:
                    give_back()
                self.settle(drawn, losses, lambda began=began: time.perf_counter() - began)  # type: ignore[misc]
                saved = self.save() if interrupt.requested or due(self.pace.save_every, self.state.step) else None
                if interrupt.requested:
                    raise TrainInterrupted(self.state.step, saved)
        self.doctor.finish()
        self.tuning.model.eval()
        return self.state


@dataclass(frozen=True)
class Draw:
    """The micro-batches of one step, and their supervised units."""

    batches: Sequence[Batch]
    units: int

    @property
    def tokens(self) -> int:
        """Tokens read, without padding."""
        return sum(batch.tokens for batch in self.batches)


def fit(tuning: Tuning, objective: Objective, batches: Batches, optimizer: torch.optim.Optimizer, pace: Pace, *,
        evaluate: Callable[[], Mapping[str, float]] | None = None, doctor: Doctor | None = None,
        watch: Watch | None = None, checkpoints: Checkpoints | None = None, state: State | None = None) -> State:
    """Train until `pace.steps` are done or patience is out, and return where the run stands.

    The tuning's tensors are those of the last step; those of the best evaluation are in the state. `evaluate` is
    called with the model in evaluation mode. With a restored `state` the run goes on where it stood.

    Raises DoctorError or NonFiniteError when a check fails, TrainInterrupted after SIGINT.
    """
    return Run(tuning=tuning, objective=objective, batches=batches, optimizer=optimizer, pace=pace,
               state=state if state is not None else State(), doctor=doctor if doctor is not None else Doctor(tuning),
               evaluate=evaluate, watch=watch, checkpoints=checkpoints).go()


def backward(tuning: Tuning, objective: Objective, batch: Batch, units: int) -> float:
    """Add the gradient of a micro-batch's share of the step's loss, and return that share."""
    loss = objective.loss(tuning.model, batch.inputs) / units
    if loss.requires_grad:  # where it does not, the doctor finds that no tensor got a gradient
        loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())


def judge(state: State, tuning: Tuning, evaluate: Callable[[], Mapping[str, float]], pace: Pace,
          watch: Watch | None) -> None:
    """Evaluate, and remember the tensors of the best figure."""
    tuning.model.eval()
    figures = evaluate()
    tuning.model.train()
    if pace.keep_best is not None:
        figure = figures[pace.keep_best]
        if better(pace.keep_best, figure, state.best):
            state.best, state.best_step, state.waited = figure, state.step, 0
            state.best_tensors = {name: p.detach().clone() for name, p in tuning.parameters().items()}
        else:
            state.waited += 1
    if watch is not None:
        watch.evaluated(state, figures)


def better(figure: str, new: float, old: float | None) -> bool:
    """Whether the new value of a figure is better: a lower loss, a higher anything else, and never a NaN."""
    if old is None:
        return not math.isnan(new)
    return new < old if figure == "loss" else new > old


def out_of_patience(state: State, pace: Pace) -> bool:
    """Whether as many evaluations in a row as the run allows brought nothing better."""
    return pace.patience is not None and state.waited >= pace.patience


def due(every: int, step: int) -> bool:
    """Whether something that happens each `every` steps happens after this one; never for 0."""
    return every > 0 and step % every == 0


