"""What a low-rank change is: its maths, its config, its value, and the layers that apply it. Needs torch only.

Each name is imported when it is first used: `LoraConfig` alone, which the command line's help reads, loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deltaw.core.adapter import Adapter, SiteDelta
    from deltaw.core.config import LoraConfig
    from deltaw.core.geometry import Geometry, Kind

__all__ = ["Adapter", "Geometry", "Kind", "LoraConfig", "SiteDelta"]

_HOME = {"Adapter": "adapter", "Geometry": "geometry", "Kind": "geometry", "LoraConfig": "config",
         "SiteDelta": "adapter"}


def __getattr__(name: str) -> object:
    """The object of this name, imported now and kept."""
    if name not in _HOME:
        raise AttributeError(f"module 'deltaw.core' has no attribute '{name}'")
    value = getattr(import_module(f"deltaw.core.{_HOME[name]}"), name)
    globals()[name] = value
    return value
