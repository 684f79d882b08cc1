"""What an adapter's files tell about it, for people who choose one; read when somebody asks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deltaw.serve.pool import read_config
from deltaw.store.locate import RECORD_FILE

MAX_RECORD = 16_000_000


def card(folder: Path) -> dict[str, Any]:
    """Base, alpha, when and on what it was trained, and its figures, as far as they are recorded."""
    config = read_config(folder)
    facts = _facts(folder / RECORD_FILE)
    training = facts.get("training")
    return {"base": config.get("base_model_name_or_path"), "alpha": config.get("lora_alpha"),
            "rank": config.get("r"), "training": training if isinstance(training, dict) else None}


def _facts(path: Path) -> dict[str, Any]:
    """The facts in `deltaw.json`; none where it is missing or damaged, for an adapter can be served without."""
    try:
        if path.stat().st_size > MAX_RECORD:
            return {}
        facts = json.loads(path.read_bytes()).get("facts")
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}
