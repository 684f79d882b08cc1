"""What a low-rank change is: its maths, its config, its value, and the layers that apply it. Needs torch only.

Each name is imported when it is first used: `LoraConfig` alone, which the command line's help reads, loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltaw.exports import exported

if TYPE_CHECKING:
    from deltaw.core.adapter import Adapter, SiteDelta
    from deltaw.core.config import LoraConfig
    from deltaw.core.geometry import Geometry, Kind

__all__ = ["Adapter", "Geometry", "Kind", "LoraConfig", "SiteDelta"]

_HOME = {"Adapter": "adapter", "Geometry": "geometry", "Kind": "geometry", "LoraConfig": "config",
         "SiteDelta": "adapter"}

__getattr__ = exported(__name__, _HOME)
