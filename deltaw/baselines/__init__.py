"""The other ways to tune a model, each through the one training loop: what LoRA is compared with.

    tuned = METHODS["bitfit"](model, BaselineConfig(), seed=0)     a Tuning: model, parameters, note, save
    with tuned.off(): ...                                          the base, to the bit
    tuned.save("out"); tuned.remove(); load("out", model)

Each name is imported when it is first used: the options alone, which the command line's help reads, load no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltaw.exports import exported

if TYPE_CHECKING:
    from deltaw.baselines.config import OPTIONS, BaselineConfig, trains_lora, virtual_tokens
    from deltaw.baselines.files import FILES, SavedBaseline, is_baseline, load, read
    from deltaw.baselines.layout import prompt_ends
    from deltaw.baselines.methods import METHODS
    from deltaw.baselines.part import Row
    from deltaw.baselines.tuned import Baseline

__all__ = [
    "FILES", "METHODS", "OPTIONS", "Baseline", "BaselineConfig", "Row", "SavedBaseline", "is_baseline", "load",
    "prompt_ends", "read", "trains_lora", "virtual_tokens",
]

_HOME = {
    "FILES": "files", "METHODS": "methods", "OPTIONS": "config", "Baseline": "tuned", "BaselineConfig": "config",
    "Row": "part", "SavedBaseline": "files", "is_baseline": "files", "load": "files", "prompt_ends": "layout",
    "read": "files", "trains_lora": "config", "virtual_tokens": "config",
}

__getattr__ = exported(__name__, _HOME)
