"""Many adapters in training at once over one frozen base.

    for each round:
        the scheduler chooses jobs within a budget of tokens; each draws the micro-batches of its next step
        micro-batches of several jobs share a pass over the base, `joint`; each job gets its own gradient
        each job takes its step for itself: clip, update, evaluate, save, finish

What a job computes is what `deltaw.train` would compute for it alone: the same random numbers, the same examples in the
same order, the same gradients to the last bits of a sum. A job that fails keeps its state and leaves; the others do not
notice. The whole set is saved between rounds, and goes on bit for bit.

    out/jobs.json    how every job stands, and the checkpoint of each from which the set goes on
    out/control/     where jobs are added, cancelled, paused and resumed while the set runs (`control`)
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from deltaw import bases
from deltaw.core.stretches import STRETCH_VALUES
from deltaw.errors import DeltawError, Fault, StateError, near
from deltaw.switch import Banks, Switchboard, attach, detach
from deltaw.train.announce import say
from deltaw.train.config import TrainConfig
from deltaw.train.foresight import check_weights, look_ahead_together
from deltaw.train.interrupt import Interrupt, TrainInterrupted
from deltaw.train.job import ActiveJob, BaseFigures, Job, JobResult
from deltaw.train.job_checks import Loader, check_jobs, load_jobs, of_job
from deltaw.train.jobs_record import Record
from deltaw.train.many_config import ManyConfig
from deltaw.train.many_result import ManyResult
from deltaw.train.memory import give_back, settled
from deltaw.train.objective import CausalLoss
from deltaw.train.passes import gradients
from deltaw.train.prepare import Choices, Preparation
from deltaw.train.run import TASK_TYPES, own_surroundings, parameters_in
from deltaw.train.scheduler import Scheduler
from deltaw.train.sharing import Sharing
from deltaw.train.tuning import LoraTuning


def train_many(jobs: Sequence[Job | TrainConfig], config: ManyConfig, *, base: bases.Base | None = None,
               quiet: bool = False) -> ManyResult:
    """Train all jobs together over one base, and return how each ended; their adapters are in their `out` folders.

    `base` takes one that is loaded already, a quantized one say. Raises what is wrong with any job before anything is
    loaded; what goes wrong in a job later ends that job alone, as `failed` in the result. TrainInterrupted after the
    first Ctrl-C, with the set saved.
    """
    with TrainMany(jobs, config, base=base, quiet=quiet) as many:
        return many.run()


class TrainMany:
    """A set of jobs at work; a context manager. `train_many` is the whole of it, `round` one joint step.

    Jobs may come and go between rounds: `add`, `cancel`, `pause`, `resume`.
    """

    def __init__(self, jobs: Sequence[Job | TrainConfig], config: ManyConfig, *, base: bases.Base | None = None,
                 quiet: bool = False) -> None:
        self.config, self.quiet = config, quiet
        self.record = Record(Path(config.out).expanduser(), resume=config.resume)
        given = [job if isinstance(job, Job) else Job(config=job) for job in jobs]
        self.given = given + self.record.jobs_beside([job.name for job in given])
        check_jobs(self.given, resume=config.resume)
        self.base_given = base
        self.jobs: dict[str, ActiveJob] = {}
        self.ended: dict[str, JobResult] = {}
        self.rounds, self.tokens = self.record.rounds, 0
        self.lines: list[str] = []
        self.scheduler = Scheduler(config.budget_tokens)
        self.bytes_per_token = 0.0
        """What a token keeps for the backward pass in shared passes; 0 where no job takes part in any."""
        self._base_bits: Mapping[str, int] | None = None

    # -- from nothing to the first round -----------------------------------------------------------------------------

    def __enter__(self) -> TrainMany:
        self.began = time.perf_counter()
        self._stack = ExitStack()
        with ExitStack() as stack:
            self.first = self.given[0].config
            stack.enter_context(own_surroundings(self.first))
            todo = [job for job in self.given if not self.record.is_over(job.name)]
            self.ended = {job.name: self.record.result(job) for job in self.given if self.record.is_over(job.name)}
            if todo:
                self._load(todo, stack)
            stack.enter_context(settled())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        if hasattr(self, "board"):
            detach(self.base.model)

    def _load(self, todo: Sequence[Job], stack: ExitStack) -> None:
        """The base, the adapters of all jobs, the ways of computing, and every job's first state."""
        if self.base_given is None:
            check_weights(self.first)
        self.base, examples = load_jobs(todo, self.base_given)
        self.shared = BaseFigures(parameters=parameters_in(self.base))
        self.loader = Loader(self.base)
        for job in todo:
            try:
                self._attach(job)
            except DeltawError as error:
                raise type(error)(*of_job(job, error)) from error
        self.lines += self._plan(todo, examples)
        first = todo[0]
        objective = first.objective if isinstance(first.objective, CausalLoss) else \
            CausalLoss() if first.config.task == "causal-lm" else None
        self.choices = Choices()
        if objective is not None:
            with self._only(first.name):
                tuning = LoraTuning(self.board, first.name, freeze_a=first.config.freeze_a)
                self._preparation = Preparation(replace(first.config, compile="off"), self.base, examples[first.name],
                                                tuning, objective, 1)
                self.choices = stack.enter_context(self._preparation.applied(self.record.choices))
        self.lines += self.choices.lines
        self.sharing = Sharing(self.base, self.board, packed=self.choices.packed)
        self.banks = Banks(self.board)
        for job in todo:
            self._activate(job, examples[job.name])
        self._fit_memory()
        self.scheduler.load_state_dict({"served": self.record.served})
        for line in self.lines:
            say(line, self.quiet)

    def _attach(self, job: Job) -> None:
        lora = replace(job.config.lora, task_type=job.config.lora.task_type or TASK_TYPES[job.config.task])
        original = self.base.folder if lora.starts_from_weights else None
        if not hasattr(self, "board"):
            self.board: Switchboard = attach(self.base.model, lora, job.name, seed=job.config.seed, original=original)
            self.board.use(None)
        else:
            self.board.add(job.name, lora, seed=job.config.seed, original=original)

    def _plan(self, todo: Sequence[Job], examples: Mapping[str, Any]) -> list[str]:
        """What the set will take at its peak; ConfigError where that cannot fit."""
        trained = {job.name: sum(target.parameters for target in self.board.table(job.name)) for job in todo}
        largest = max(todo, key=lambda job: trained[job.name]).config
        return look_ahead_together(replace(largest, plan=self.first.plan), self.base, examples,
                                   trained=list(trained.values()), tokens=self.config.budget_tokens)

    def _activate(self, job: Job, examples: Any) -> None:
        """Make the attached adapter a job at work, from its checkpoint where the record names one."""
        active = ActiveJob(job, self.base, examples, self.board, self.choices, self.shared)
        self.jobs[job.name] = active
        self.scheduler.join(job.name, job.priority)
        try:
            active.why_apart = self.sharing.why_apart(active, self.jobs.values())
            batches = None if job.batches is None else job.batches(self.base)
            # A frozen A, or a weight of its own, is part of what this job alone must leave as it is.
            shares = not (job.config.freeze_a or job.config.lora.starts_from_weights)
            active.session.doctor.base = self._base_bits if shares else None
            active.begin(self.record.checkpoint(job, active.session.checkpoints), batches=batches)
            self._base_bits = active.session.doctor.base if shares else self._base_bits
            active.status = self.record.status(job.name)
        except Exception as error:
            self._fail(active, error)
        if active.why_apart:
            self.lines.append(f"job '{job.name}' has passes of its own: {active.why_apart}")

    def _fit_memory(self) -> None:
        """Count what a token keeps for the backward pass, and lower the budget to the memory that there is."""
        joint = [job for job in self.jobs.values() if job.status == "running" and not job.why_apart]
        if not joint:
            return
        with self._only(joint[0].name):
            self.bytes_per_token = joint[0].bytes_per_token()
        budget = self.config.budget_tokens
        if self.config.memory is not None:
            room = self.config.memory * 2**30 - 2 * 4 * STRETCH_VALUES
            budget = max(1, min(budget, int(room / self.bytes_per_token)))
        self.scheduler.budget = budget
        self.lines.append(f"together: passes of up to {budget:,} tokens, which keep about "
                          f"{budget * self.bytes_per_token / 2**30:.2f} GiB for the backward pass")

    @contextmanager
    def _only(self, name: str) -> Iterator[None]:
        self.board.use(name)
        try:
            yield
        finally:
            self.board.use(None)

    # -- rounds ------------------------------------------------------------------------------------------------------

    def run(self) -> ManyResult:
        """Rounds until no job can take a step, then how each ended. Paused jobs are saved and stay paused."""
        from deltaw.train.control import Control
        from deltaw.train.jobs_table import JobsTable

        control = Control(self.record.folder) if self.config.control else None
        with Interrupt() as interrupt, JobsTable(quiet=self.quiet) as table:
            self.save()
            while True:
                if control is not None:
                    control.obey(self)
                if not self.round():
                    break
                table.show(self.jobs.values(), self.ended.values())
                if interrupt.requested:
                    self.save()
                    raise TrainInterrupted(self.rounds, self.record.folder)
                every = self._save_every()
                if every and self.rounds % every == 0:
                    self.save()
        self.save()
        return self.result()

    def round(self) -> bool:
        """One joint step of the jobs that the scheduler chooses; False where none can take one."""
        tokens = {}
        for job in list(self.running()):
            with self._failing(job):
                tokens[job.name] = job.draw().tokens
        if not tokens:
            return False
        chosen = [self.jobs[name] for name in self.scheduler.choose(tokens)]
        self.banks.hold([job.name for job in self.jobs.values() if not job.why_apart])
        if not self.base.model.training:
            self.base.model.train()
        losses, seconds = gradients(self.board, chosen, self.scheduler.budget, self._failing)
        if any(job.session.pace.release_memory for job in chosen):
            give_back()
        for job in chosen:
            if job.status != "running":
                continue
            with self._failing(job):
                before = job.state.tokens
                job.settle(losses[job.name], seconds[job.name])
                self.tokens += job.state.tokens - before
            if job.is_finished:
                self._end(job)
        self.rounds += 1
        return True

    def running(self) -> Iterator[ActiveJob]:
        """The jobs that can take a step."""
        return (job for job in self.jobs.values() if job.status == "running")

    # -- coming and going --------------------------------------------------------------------------------------------

    def add(self, job: Job | TrainConfig) -> None:
        """Take another job in, from the next round on. Raises what is wrong with it; the set is then as it was."""
        job = job if isinstance(job, Job) else Job(config=job)
        check_jobs([*self.given, job], resume=self.config.resume, at_work=[*self.jobs, *self.ended])
        examples = self.loader.examples(job.config)
        self._attach(job)
        self.given.append(job)
        self._share()
        self._activate(job, examples)

    def cancel(self, name: str) -> None:
        """End a job now; its state is saved, and it can go on alone."""
        job = self._known(name)
        with self._failing(job):
            job.save()
            job.status = "cancelled"
            self._end(job)

    def pause(self, name: str) -> None:
        """Let a job rest until `resume`."""
        self._known(name).status = "paused"

    def resume(self, name: str) -> None:
        """Let a paused job go on; it has nothing to catch up on."""
        job = self._known(name)
        if job.status == "paused":
            job.status = "running"
            self.scheduler.leave(name)
            self.scheduler.join(name, job.job.priority)

    def _known(self, name: str) -> ActiveJob:
        if name not in self.jobs:
            raise StateError(Fault(f"job '{name}'", "has ended" if name in self.ended else "is not in the set",
                                   "one of " + (", ".join(self.jobs) or "none"), near(name, self.jobs)))
        return self.jobs[name]

    @contextmanager
    def _failing(self, job: ActiveJob) -> Iterator[None]:
        """What goes wrong in the block ends this job, and no other."""
        try:
            yield
        except Exception as error:
            self._fail(job, error)

    def _fail(self, job: ActiveJob, error: Exception) -> None:
        job.status = "failed"
        job.error = str(error) if isinstance(error, (DeltawError, OSError)) else f"{type(error).__name__}: {error}"
        say(f"job '{job.name}' failed at step {job.steps}: {job.error}", self.quiet)
        if job.run is not None:
            job.run.optimizer.zero_grad(set_to_none=True)
            try:
                job.save()
            except Exception as second:  # a full disk, most likely: the checkpoint before this one is whole
                say(f"job '{job.name}': its last state could not be saved ({second})", self.quiet)
        self._end(job)

    def _end(self, job: ActiveJob) -> None:
        """Take a job out, with its result."""
        self.ended[job.name] = job.report()
        self.scheduler.leave(job.name)
        job.close()
        del self.jobs[job.name]
        self._share()

    def _share(self) -> None:
        """Find layers of one input anew: which they are follows from the adapters that are there, and nothing else."""
        if hasattr(self, "_preparation"):
            with self.board.off():
                self.board.share_inputs(self._preparation.look)

    # -- what stays --------------------------------------------------------------------------------------------------

    def _save_every(self) -> int:
        if self.config.save_every is not None:
            return self.config.save_every
        paces = [job.session.pace.save_every for job in self.jobs.values()]
        return min((every for every in paces if every), default=0)

    def save(self) -> None:
        """Save every job, and then, in one step, the record that says where the set stands."""
        for job in list(self.jobs.values()):
            with self._failing(job):
                job.save()
        self.record.write(self)

    def result(self) -> ManyResult:
        """How every job stands."""
        now = self.ended | {name: job.report() for name, job in self.jobs.items()}
        order = [job.name for job in self.given]
        return ManyResult(jobs={name: now[name] for name in order if name in now}, rounds=self.rounds,
                          seconds=time.perf_counter() - self.began, tokens=self.tokens, lines=tuple(self.lines))
