"""deltaw: low-rank changes ΔW = s·BA to frozen networks: train, switch, merge and share them.

    board = deltaw.attach(model, deltaw.LoraConfig(r=8, target_modules="all-linear"), name="sql")

The names below are the public face. Each is imported when it is first used, so that `import deltaw` itself loads
neither torch nor transformers. `deltaw.train` and `deltaw.plan` are both packages and calls: see
`deltaw/train/__init__.py`.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

if "torch" not in sys.modules:
    # Idle threads of a product should sleep and not spin: with one other busy process on the machine a training step is
    # 2.3 times faster so, and alone it takes the same time (docs/log.md). OpenMP reads this once, when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from deltaw import errors as errors
    from deltaw.core import Adapter as Adapter
    from deltaw.core import LoraConfig as LoraConfig
    from deltaw.merge import merge_files as merge_files
    from deltaw.plan import Plan as Plan
    from deltaw.plan import PlanConfig as PlanConfig
    from deltaw.plan import plan as plan
    from deltaw.store import load as load
    from deltaw.switch import Switchboard as Switchboard
    from deltaw.switch.attachment import attach as attach
    from deltaw.switch.attachment import board as board
    from deltaw.switch.attachment import detach as detach
    from deltaw.train import TrainConfig as TrainConfig
    from deltaw.train import train as train

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "LoraConfig",
    "Plan",
    "PlanConfig",
    "Switchboard",
    "TrainConfig",
    "__version__",
    "attach",
    "board",
    "detach",
    "errors",
    "load",
    "merge_files",
    "plan",
    "train",
]

_MODULE_ITSELF = ("errors", "plan", "train")
_HOME = {
    "Adapter": "deltaw.core",
    "LoraConfig": "deltaw.core",
    "Plan": "deltaw.plan",
    "PlanConfig": "deltaw.plan",
    "Switchboard": "deltaw.switch",
    "TrainConfig": "deltaw.train",
    "attach": "deltaw.switch",
    "board": "deltaw.switch",
    "detach": "deltaw.switch",
    "load": "deltaw.store",
    "merge_files": "deltaw.merge",
}


def __getattr__(name: str) -> object:
    """The public object of this name, imported now and kept."""
    if name in _MODULE_ITSELF:
        return import_module(f"deltaw.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'deltaw' has no attribute '{name}'")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted(set(globals()) | set(__all__))
