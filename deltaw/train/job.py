"""One job of a set: a `Job` is the value, an `ActiveJob` the run in the making over the shared base.

A job is a run of its own in everything but the base and the forward pass: its files, data, optimizer, random numbers,
doctor, checkpoints and result are those that `deltaw.train` would give it, so that it can also go on alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from deltaw import bases
from deltaw.errors import DataError, Fault
from deltaw.switch import Switchboard
from deltaw.train.config import TrainConfig
from deltaw.train.decoding import device_of
from deltaw.train.examples import Examples
from deltaw.train.loop import Draw, Run, backward, due
from deltaw.train.objective import Objective
from deltaw.train.prepare import Choices
from deltaw.train.progress import Together
from deltaw.train.result import TrainResult
from deltaw.train.run import Session
from deltaw.train.state import Batches, State
from deltaw.train.tuning import LoraTuning

Status = Literal["running", "paused", "finished", "failed", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to train, and how much of the machine it gets."""

    config: TrainConfig
    """The run, as `deltaw.train` would do it alone; its `name` names the job."""
    priority: float = 1.0
    """Share of the tokens where jobs compete: one of 2 gets twice those of one of 1."""
    objective: Objective | None = None
    """Another loss than the task's own; such a job has passes of its own."""
    batches: Callable[[bases.Base], Batches] | None = None
    """Another stream of micro-batches than the config's data, made for the loaded base."""

    @property
    def name(self) -> str:
        """The job's name, which is its adapter's."""
        return self.config.name


@dataclass(frozen=True, kw_only=True)
class JobResult:
    """How a job of a set ended."""

    name: str
    """The job."""
    status: Status
    """finished, failed, cancelled, or paused (it can go on)."""
    steps: int = 0
    """Optimizer steps done."""
    planned_steps: int = 0
    """Optimizer steps planned."""
    result: TrainResult | None = None
    """What the run did, where it finished."""
    error: str = ""
    """Why it failed."""
    checkpoint: str | None = None
    """The newest checkpoint, from which it can go on, alone or in a set."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dict(vars(self)) | {"result": None if self.result is None else self.result.to_dict()}


@dataclass
class BaseFigures:
    """What the base alone does on held-out rows: the same for all jobs with the same rows, and measured once."""

    parameters: int = 0
    """How many numbers the base has."""
    figures: dict[object, Mapping[str, float]] = field(default_factory=dict)
    answers: dict[object, list[str]] = field(default_factory=dict)


class JobSession(Session):
    """A session that shares what the base does with its neighbours' sessions."""

    shared: BaseFigures

    def figures_of_base(self) -> Mapping[str, float]:
        """The base's figures on this job's rows."""
        key = self._rows_key((self.config.metrics, self.config.batch_size, self.config.max_new_tokens))
        if key not in self.shared.figures:
            self.shared.figures[key] = super().figures_of_base()
        return self.shared.figures[key]

    def answers_of_base(self) -> list[str]:
        """The base's answers to this job's samples."""
        key = self._rows_key((tuple(self.shown), self.config.max_new_tokens))
        if key not in self.shared.answers:
            self.shared.answers[key] = super().answers_of_base()
        return self.shared.answers[key]

    def _rows_key(self, more: tuple[object, ...]) -> object:
        """What held-out figures depend on, apart from the adapter."""
        config = self.config
        return (self.examples.digest, config.data, str(config.valid), tuple(self.examples.valid_rows),
                tuple(sorted(config.columns.items())), config.max_length, config.train_on, *more)


class ActiveJob:
    """A job with its adapter on the board. Whoever calls its methods handles what they raise."""

    def __init__(self, job: Job, base: bases.Base, examples: Examples, board: Switchboard, choices: Choices,
                 shared: BaseFigures) -> None:
        self.job, self.name, self.board, self.base = job, job.name, board, base
        self.status: Status = "running"
        self.error = ""
        self.why_apart = ""
        """Why its passes are its own; "" where it shares them."""
        self.drawn: Draw | None = None
        self.began, self.begun_at = time.perf_counter(), 0
        self.generator = torch.Generator(device_of(base.model)).manual_seed(job.config.seed)
        """Where its dropout is drawn from."""
        self.result: TrainResult | None = None
        self.loss: float | None = None
        self.figures: Mapping[str, float] = {}
        config = job.config
        tuning = LoraTuning(board, self.name, freeze_a=config.freeze_a)
        self.session = JobSession(config, Path(config.out).expanduser(), base, examples, tuning,
                                  base_parameters=shared.parameters, quiet=True)
        self.session.shared, self.session.choices = shared, choices
        if job.objective is not None:
            self.session.objective = job.objective  # type: ignore[assignment]
        self.run: Run | None = None
        self._stream = ExitStack()

    def begin(self, found: Path | None, *, batches: Batches | None = None) -> None:
        """Everything up to the first step, or up to where a checkpoint was saved."""
        if batches is None:
            batches = self._stream.enter_context(self.session.examples.batches(self.base,
                                                                               packed=self.session.choices.packed))
        with self.on():
            self.run = run = self.session.begin(found, batches)
            run.watch = Together([self.session.log, _Last(self)])
            run.start()
        self.began, self.begun_at = time.perf_counter(), run.state.step

    @property
    def state(self) -> State:
        """Where the run stands."""
        return self.run.state if self.run is not None else State()

    @contextmanager
    def on(self) -> Iterator[None]:
        """The model as this job alone would have it: its adapter on, its random numbers next."""
        device = self.generator.device
        outside = _random_state(device)
        _set_random_state(device, self.generator.get_state())
        before = self.board.active
        self.board.use(self.name)
        try:
            yield
        finally:
            self.board.use(before)
            self.generator.set_state(_random_state(device))
            _set_random_state(device, outside)

    def draw(self) -> Draw:
        """The micro-batches of the job's next step, drawn once."""
        assert self.run is not None
        if self.drawn is None:
            self._before_draw = self.run.batches.state_dict()
            try:
                self.drawn = self.run.draw()
            except StopIteration:
                raise DataError(Fault(f"job '{self.name}'", f"its data ran dry at step {self.state.step + 1}",
                                      f"examples for {self.run.pace.steps} steps",
                                      "Give a stream that begins anew, or fewer steps")) from None
        return self.drawn

    def backward_alone(self, number: int) -> float:
        """The gradient of one micro-batch in a pass of its own, as in a run alone; its share of the loss."""
        assert self.run is not None
        assert self.drawn is not None
        with self.on():
            return backward(self.run.tuning, self.run.objective, self.drawn.batches[number], self.drawn.units)

    def settle(self, losses: list[float], seconds: float) -> None:
        """Take the step, and save and finish where that is due."""
        assert self.run is not None
        drawn, self.drawn = self.drawn, None
        assert drawn is not None
        began = time.perf_counter()
        with self.on():
            self.run.settle(drawn, losses, lambda: seconds + time.perf_counter() - began)
            if due(self.run.pace.save_every, self.state.step):
                self.run.save()
            if self.run.is_done:
                self.run.doctor.finish()
                self.run.tuning.model.eval()
                self.result = self.session.finish(self.state, self.began)
                self.status = "finished"

    def save(self) -> Path:
        """A checkpoint of the state after its last whole step."""
        run = self.run
        assert run is not None
        # A step that is drawn and not taken yet is drawn again by whoever goes on from here.
        place = run.batches if self.drawn is None else _Place(self._before_draw)
        with self.on():
            return self.session.checkpoints.save(run.state, run.tuning, run.optimizer, place)

    def close(self) -> None:
        """Let the adapter, its gradients and its optimizer go; what is on the disk stays."""
        self._stream.close()
        if self.name in self.board.names:
            self.board.remove(self.name)
        self.drawn = self.run = None

    def report(self) -> JobResult:
        """How the job stands."""
        latest = self.session.checkpoints.latest()
        return JobResult(name=self.name, status=self.status, steps=self.steps, planned_steps=self.session.pace.steps,
                         result=self.result, error=self.error, checkpoint=None if latest is None else str(latest))

    @property
    def is_finished(self) -> bool:
        """Whether all is done and saved."""
        return self.status == "finished"

    @property
    def steps(self) -> int:
        """Steps done, also after `close`."""
        if self.run is not None:
            self._steps = self.run.state.step
        return self._steps

    _steps = 0


class _Place:
    """Where a stream of batches stood."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        """The position."""
        return self.state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """A place does not move."""
        raise NotImplementedError

    def __next__(self) -> Any:
        """There is nothing to give."""
        raise StopIteration


class _Last:
    """Remembers a job's latest figures for the table."""

    def __init__(self, job: ActiveJob) -> None:
        self.job = job

    def step(self, state: State, *, loss: float, rate: float, norm: float) -> None:
        """The loss of a step."""
        self.job.loss = loss

    def evaluated(self, state: State, figures: Mapping[str, float]) -> None:
        """The figures of an evaluation."""
        self.job.figures = dict(figures)


def _random_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(device: torch.device, state: torch.Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


