"""A whole run: load, attach, look at the base, train, keep the best, look again, save.

    out/adapter_config.json, adapter_model.safetensors, deltaw.json    the adapter
    out/train_config.json     the config        out/metrics.jsonl     every step and evaluation
    out/train_result.json     figures           out/checkpoints/      to resume from

CPU threads: torch takes one for each core unless `threads` says otherwise. Several runs on one machine should share the
cores between them (`threads`) and start with OMP_WAIT_POLICY=PASSIVE, or idle threads of one spin on the other's cores.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from deltaw import baselines, bases
from deltaw.baselines.files import FILES
from deltaw.core.packed import numbers_in
from deltaw.errors import ConfigError, Fault
from deltaw.store.atomic import replace_folder
from deltaw.switch import attach
from deltaw.train.announce import announce, say
from deltaw.train.checkpoint import Checkpoints, check_same_run, identity, put_tensors
from deltaw.train.config import TrainConfig
from deltaw.train.decoding import device_of
from deltaw.train.doctor import Doctor
from deltaw.train.evaluation import EvalResult, answers, evaluate
from deltaw.train.examples import Examples, load_examples
from deltaw.train.foresight import check_weights, evaluation_pace, look_ahead, optimizer_steps
from deltaw.train.loop import Run
from deltaw.train.memory import count_peak_anew, peak_memory
from deltaw.train.objective import objective_for
from deltaw.train.optimizer import adamw, schedule, warmup_of
from deltaw.train.prepare import Choices, Preparation
from deltaw.train.progress import MetricsLog, ProgressBar, Together, read_metrics
from deltaw.train.record import facts, improvement, site_rows, versions
from deltaw.train.result import Answer, TrainResult
from deltaw.train.state import Batches, Pace, State
from deltaw.train.summary import print_summary
from deltaw.train.terms import Terms
from deltaw.train.tuning import Attached, LoraTuning

TASK_TYPES = {"causal-lm": "CAUSAL_LM", "seq-cls": "SEQ_CLS"}
"""PEFT's name of each task."""
CONFIG_FILE, METRICS_FILE, RESULT_FILE = "train_config.json", "metrics.jsonl", "train_result.json"
CHOICES_FILE = "train_choices.json"
CHECKPOINTS = "checkpoints"


def train(config: TrainConfig, *, quiet: bool = False) -> TrainResult:
    """Fine-tune an adapter as `config` says, and return what it did; the adapter is in `config.out`.

    Shows progress and a table of results on stderr unless `quiet`. The caller's random generators and number of threads
    are as before afterwards. Raises the errors of `deltaw.errors`, and TrainInterrupted after the first Ctrl-C.
    """
    began = time.perf_counter()
    out = Path(config.out).expanduser()
    check_folder(out, config)
    with own_surroundings(config):
        check_weights(config)
        base, examples = load_examples(config)
        if not quiet:
            announce(base, examples)
        for line in look_ahead(config, base, examples):
            say(line, quiet)
        count = parameters_in(base)
        session = Session(config, out, base, examples, put_on(config, base), base_parameters=count, quiet=quiet)
        with session.prepared():
            state = session.train()
        result = session.finish(state, began)
    if not quiet:
        print_summary(result)
    return result


class Session:
    """One run in the making: what is needed before, during and after the loop."""

    def __init__(self, config: TrainConfig, out: Path, base: bases.Base, examples: Examples, tuning: Attached, *,
                 base_parameters: int, quiet: bool) -> None:
        self.config, self.out, self.base, self.examples, self.quiet = config, out, base, examples, quiet
        self.tuning, self.base_parameters = tuning, base_parameters
        self.objective = objective_for(config.task, Terms(config.label_smoothing, config.z_loss))
        self.choices = Choices()
        self.doctor = Doctor(self.tuning, window=config.doctor_steps, allow_unused=config.allow_unused)
        self.optimizer = adamw(self.tuning.parameters(), learning_rate=config.learning_rate, eps=config.eps,
                               weight_decay=config.weight_decay, betas=config.betas,
                               ratio_of_B=config.loraplus_lr_ratio, bits=8 if config.optimizer == "adamw8bit" else 32)
        self.identity = identity(config, data_sha256=examples.digest, base=self.tuning.fingerprint().to_dict())
        self.checkpoints = Checkpoints(out / CHECKPOINTS, self.identity, keep=config.keep_checkpoints)
        self.pace = pace_of(config, self.examples.batches_per_epoch)
        self.shown = examples.valid_rows[:config.samples] if config.task == "causal-lm" and examples.has_prompts else []

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """The model with the fast ways of computing that suit it, chosen now or when the run began."""
        file = self.out / CHOICES_FILE
        resumes = self.config.resume and self.checkpoints.latest() is not None and file.is_file()
        recorded = Choices(**json.loads(file.read_text(encoding="utf-8"))) if resumes else None
        preparation = Preparation(self.config, self.base, self.examples, self.tuning, self.objective, self.pace.steps)
        with preparation.applied(recorded) as self.choices:
            for line in self.choices.lines:
                say(line, self.quiet)
            yield

    def train(self) -> State:
        """Run the loop, from the start or from the last checkpoint."""
        count_peak_anew(device_of(self.base.model))
        with ExitStack() as stack:
            batches = stack.enter_context(self.examples.batches(self.base, packed=self.choices.packed))
            run = self.begin(self.checkpoints.latest() if self.config.resume else None, batches)
            self.tuning.forget_base()
            if not self.quiet:
                bar = stack.enter_context(ProgressBar(self.pace.steps, begun=run.state.step,
                                                      device=device_of(self.base.model)))
                run.watch = Together([self.log, bar])
            return run.go()

    def begin(self, found: Path | None, batches: Batches) -> Run:
        """Everything up to the first step, of a new run or of one that goes on from a checkpoint."""
        config = self.config
        state = State()
        if found is not None:
            check_same_run(config, self.identity, found)
            state = self.checkpoints.restore(found, self.tuning, self.optimizer, batches)
            say(f"resuming at step {state.step} of {self.pace.steps}", self.quiet)
        else:
            shutil.rmtree(self.checkpoints.folder, ignore_errors=True)
        replace_folder(self.out, {CONFIG_FILE: json.dumps(config.to_dict(), indent=1).encode(),
                                  CHOICES_FILE: json.dumps(self.choices.to_dict(), indent=1).encode()})
        (self.out / RESULT_FILE).unlink(missing_ok=True)
        self.log = MetricsLog(self.out / METRICS_FILE, after=state.step if found is not None else None)
        with self.tuning.off():
            self.before = self.figures_before(self.log, resumed=found is not None)
            self.answers_before = self.answers_of_base()
        return Run(tuning=self.tuning, objective=self.objective, batches=batches, optimizer=self.optimizer,
                   pace=self.pace, state=state, evaluate=lambda: self.evaluate().figures, doctor=self.doctor,
                   watch=self.log, checkpoints=self.checkpoints)

    def figures_before(self, log: MetricsLog, *, resumed: bool) -> Mapping[str, float]:
        """The base's figures: measured, or those that the run wrote down when it began."""
        rows = read_metrics(self.out / METRICS_FILE) if resumed else []
        for row in rows:
            if row["event"] == "eval" and row["step"] == 0:
                return {name: value for name, value in row.items() if name not in ("event", "step")}
        figures = self.figures_of_base()
        log.evaluated(State(), figures)
        return figures

    def figures_of_base(self) -> Mapping[str, float]:
        """The base's figures, measured with nothing on."""
        say("evaluating the base", self.quiet)
        return self.evaluate().figures

    def finish(self, state: State, began: float) -> TrainResult:
        """Keep the best tensors, evaluate and save the adapter, and write down what the run was."""
        best = state.best_step if state.best_tensors else None
        if state.best_tensors:
            put_tensors(state.best_tensors, self.tuning)
        after = self.evaluate().figures
        answered = tuple(Answer(self.prompt_text(row), self.examples.valid.prompt(row).answer, *pair) for row, *pair in
                         zip(self.shown, self.answers_before, self.answer(), strict=True))
        self.tuning.note(**facts(self.config, self.base, self.examples, state, self.before, after))
        self.tuning.save(self.out)
        for name in set(FILES) - set(self.tuning.file_names):  # of another method, trained into this folder before
            (self.out / name).unlink(missing_ok=True)
        result = TrainResult(
            adapter=str(self.out), base=self.base.source, config=self.config.to_dict(), steps=state.step,
            planned_steps=self.pace.steps, best_step=best, before=self.before, after=after, answers=answered,
            curve=tuple(read_metrics(self.out / METRICS_FILE)), sites=site_rows(self.tuning),
            checks={check.name: check.found for check in self.doctor.checks} | improvement(self.before, after)
            | ({"computed": "; ".join(self.choices.lines)} if self.choices.lines else {}),
            plain_layers=self.choices.plain, data=self.examples.facts(),
            trained_parameters=sum(p.numel() for p in self.tuning.parameters().values()),
            base_parameters=self.base_parameters,
            adapter_bytes=sum((self.out / name).stat().st_size for name in self.tuning.file_names),
            tokens=state.tokens, train_seconds=state.seconds, total_seconds=time.perf_counter() - began,
            peak_memory=peak_memory(device_of(self.base.model)), precision=self.base.precision, versions=versions())
        replace_folder(self.out, {RESULT_FILE: json.dumps(result.to_dict(), indent=1).encode()})
        return result

    def evaluate(self) -> EvalResult:
        """The held-out figures of the model as it is now."""
        config = self.config
        with self.layers_as_they_are():
            return evaluate(self.base.model, self.base.tokenizer, self.examples.valid, rows=self.examples.valid_rows,
                            metrics=config.metrics, batch_size=config.batch_size, max_new_tokens=config.max_new_tokens)

    def answers_of_base(self) -> list[str]:
        """What the base answers to the samples, with nothing on."""
        return self.answer()

    def answer(self) -> list[str]:
        """What the model as it is now answers to the samples."""
        with self.layers_as_they_are():
            return answers(self.base.model, self.base.tokenizer, self.examples.valid, self.shown,
                           max_new_tokens=self.config.max_new_tokens) if self.shown else []

    @contextmanager
    def layers_as_they_are(self) -> Iterator[None]:
        """No compiled layer runs in the block: each other shape and mode would be compiled anew."""
        if not self.choices.compiled:
            yield
            return
        with torch.compiler.set_stance("force_eager"):
            yield

    def prompt_text(self, row: int) -> str:
        """The prompt of a held-out row, in the row's own words."""
        return self.examples.valid.question(row)


def parameters_in(base: bases.Base) -> int:
    """How many numbers the base has, as long as nothing is attached to it."""
    return sum(numbers_in(p) for p in base.model.parameters())


def put_on(config: TrainConfig, base: bases.Base) -> Attached:
    """What the config trains, on the base's model; `TargetError` where it lacks what the method needs."""
    if config.method == "lora":
        lora = replace(config.lora, task_type=config.lora.task_type or TASK_TYPES[config.task])
        board = attach(base.model, lora, name=config.name, seed=config.seed,
                       original=base.folder if lora.starts_from_weights else None)
        return LoraTuning(board, config.name, freeze_a=config.freeze_a)
    return baselines.METHODS[config.method](base.model, config.baseline, config.seed,
                                            lora=config.lora if baselines.trains_lora(config.method) else None)


def check_folder(out: Path, config: TrainConfig) -> None:
    """Refuse a folder that cannot be written to, or whose unfinished run would be lost."""
    if out.exists() and not out.is_dir():
        raise ConfigError(Fault("TrainConfig.out", f"'{out}' is a file", "a folder"))
    unfinished = (out / CHECKPOINTS).is_dir() and not (out / RESULT_FILE).is_file()
    if unfinished and not config.resume and any((out / CHECKPOINTS).glob("step-*")):
        raise ConfigError(Fault("TrainConfig.out", f"'{out}' holds a run that was not finished", "a new folder",
                                f"Go on with it with resume, or delete {out / CHECKPOINTS}"))


@contextmanager
def own_surroundings(config: TrainConfig) -> Iterator[None]:
    """The config's seed and threads for the length of the block; the caller's before and after."""
    threads = torch.get_num_threads()
    python = random.getstate()
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        random.seed(config.seed)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            random.setstate(python)


def pace_of(config: TrainConfig, batches_per_epoch: int) -> Pace:
    """When things happen, from the config and the number of micro-batches in an epoch."""
    steps = optimizer_steps(config, batches_per_epoch)
    warmup = warmup_of(steps, ratio=config.warmup_ratio, steps=config.warmup_steps)
    factor = schedule(config.schedule, total=steps, warmup=warmup)
    eval_every = evaluation_pace(config, steps)
    return Pace(steps=steps, rate=lambda step: config.learning_rate * factor(step), accumulate=config.grad_accumulation,
                max_grad_norm=config.max_grad_norm, eval_every=eval_every, keep_best=config.keep_best,
                save_every=eval_every if config.save_every is None else config.save_every, patience=config.early_stop,
                release_memory=config.release_memory)
