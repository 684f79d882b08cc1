"""Before you run: parameters exactly, peak memory and time within a stated error, from shapes alone.

    plan(PlanConfig(model="llama-7b", device="rtx4090", batch_size=4, max_length=512))

The package is also a call, since the verb is the folder's name: `deltaw.plan(config)` runs `deltaw.plan.run.plan`.
Each name is imported when it is first used: `PlanConfig` alone, which the command line's help reads, loads no torch.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

from deltaw.exports import exported

if TYPE_CHECKING:
    from deltaw.plan.config import PlanConfig
    from deltaw.plan.run import MethodPlan, Plan, plan

__all__ = ["MethodPlan", "Plan", "PlanConfig", "plan"]

_HOME = {"MethodPlan": "run", "Plan": "run", "PlanConfig": "config", "plan": "run"}

__getattr__ = exported(__name__, _HOME)


class _CallablePackage(ModuleType):
    """A package that does its verb when it is called."""

    def __call__(self, config: PlanConfig, *, search: bool = True, calibrates: bool = False) -> Plan:
        """Plan as `config` asks; see `deltaw.plan.run.plan`."""
        from deltaw.plan.run import plan

        return plan(config, search=search, calibrates=calibrates)


sys.modules[__name__].__class__ = _CallablePackage
