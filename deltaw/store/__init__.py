"""Files: an adapter as PEFT's folder with `deltaw.json` beside it, both ways, and never a pickle."""

from __future__ import annotations

from deltaw.store.read import load
from deltaw.store.settle import settle_parameters
from deltaw.store.write import save

__all__ = ["load", "save", "settle_parameters"]
