"""The training loop. Every run of deltaw goes through `fit`; it reads from top to bottom.

    for each step:
        sum the loss over the step's supervised units, divide by their number, differentiate
        clip, update, watch

It knows no adapter, no file and no command line: a `Tuning` says what is trained, an `Objective` what is minimised.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import torch

from deltaw.train.checkpoint import Checkpoints
from deltaw.train.doctor import Doctor
from deltaw.train.interrupt import Interrupt, TrainInterrupted
from deltaw.train.objective import Objective
from deltaw.train.optimizer import set_rate
from deltaw.train.state import Batch, Batches, Pace, State, Watch
from deltaw.train.tuning import Tuning


def fit(tuning: Tuning, objective: Objective, batches: Batches, optimizer: torch.optim.Optimizer, pace: Pace, *,
        evaluate: Callable[[], Mapping[str, float]] | None = None, doctor: Doctor | None = None,
        watch: Watch | None = None, checkpoints: Checkpoints | None = None, state: State | None = None) -> State:
    """Train until `pace.steps` are done or patience is out, and return where the run stands.

    The tuning's tensors are those of the last step; those of the best evaluation are in the state. `evaluate` is
    called with the model in evaluation mode. With a restored `state` the run goes on where it stood.

    Raises DoctorError or NonFiniteError when a check fails, TrainInterrupted after SIGINT.
    """
    model, parameters = tuning.model, list(tuning.parameters().values())
    state = state if state is not None else State()
    doctor = doctor if doctor is not None else Doctor(tuning)
    doctor.start()
    model.train()
    optimizer.zero_grad(set_to_none=True)
    with Interrupt() as interrupt:
        while state.step < pace.steps and not out_of_patience(state, pace):
            began = time.perf_counter()
            micro_batches = [next(batches) for _ in range(pace.accumulate)]
            units = sum(objective.units(batch.inputs) for batch in micro_batches)
            doctor.check_units(state.step + 1, units, [batch.where for batch in micro_batches])

            losses = [backward(tuning, objective, batch, units) for batch in micro_batches]
            doctor.check_loss(state.step + 1, losses, [batch.where for batch in micro_batches])
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            rate = pace.rate(state.step)
            doctor.check_gradients(state.step + 1, rate, float(norm))

            torch.nn.utils.clip_grads_with_norm_(parameters, pace.max_grad_norm or math.inf, norm)
            set_rate(optimizer, rate)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            state.step += 1
            state.units += units
            state.tokens += sum(batch.tokens for batch in micro_batches)
            state.seconds += time.perf_counter() - began
            doctor.check_movement(state.step, rate)
            if watch is not None:
                watch.step(state, loss=sum(losses), rate=rate, norm=float(norm))
            if evaluate is not None and due(pace.eval_every, state.step):
                judge(state, tuning, evaluate, pace, watch)
            saved = None
            if checkpoints is not None and (interrupt.requested or due(pace.save_every, state.step)):
                saved = checkpoints.save(state, tuning, optimizer, batches)
            if interrupt.requested:
                raise TrainInterrupted(state.step, saved)
    doctor.finish()
    model.eval()
    return state


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


