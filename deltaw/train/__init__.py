"""Train an adapter: `deltaw.train(TrainConfig(...))` is the whole run, `fit` is its loop.

The package is also a call, since the verb is the folder's name: `deltaw.train(config)` runs `deltaw.train.run.train`.
Each name is imported when it is first used: `TrainConfig` alone, which the command line's help reads, loads no torch.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

from deltaw.exports import exported

if TYPE_CHECKING:
    from deltaw.train.config import TrainConfig
    from deltaw.train.decoding import generate, score_choices
    from deltaw.train.evaluation import EvalResult, evaluate
    from deltaw.train.interrupt import TrainInterrupted
    from deltaw.train.job import Job, JobResult
    from deltaw.train.loop import fit
    from deltaw.train.many import TrainMany, train_many
    from deltaw.train.many_config import ManyConfig
    from deltaw.train.many_result import ManyResult
    from deltaw.train.research import AdamParams, Workbench
    from deltaw.train.result import TrainResult
    from deltaw.train.run import train

__all__ = [
    "AdamParams", "EvalResult", "Job", "JobResult", "ManyConfig", "ManyResult", "TrainConfig", "TrainInterrupted",
    "TrainMany", "TrainResult", "Workbench", "evaluate", "fit", "generate", "score_choices", "train", "train_many",
]

_HOME = {
    "AdamParams": "research", "Job": "job", "JobResult": "job", "ManyConfig": "many_config",
    "ManyResult": "many_result", "TrainMany": "many", "Workbench": "research", "train_many": "many",
    "EvalResult": "evaluation", "TrainConfig": "config", "TrainInterrupted": "interrupt", "TrainResult": "result",
    "evaluate": "evaluation", "fit": "loop", "generate": "decoding", "score_choices": "decoding", "train": "run",
}

__getattr__ = exported(__name__, _HOME)


class _CallablePackage(ModuleType):
    """A package that does its verb when it is called."""

    def __call__(self, config: TrainConfig, *, quiet: bool = False) -> TrainResult:
        """Train as `config` says; see `deltaw.train.run.train`."""
        from deltaw.train.run import train

        return train(config, quiet=quiet)


sys.modules[__name__].__class__ = _CallablePackage
