"""What a run may be judged by, besides its loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Metric = Callable[[Sequence[Any], Sequence[Any]], float]
"""A custom metric: (predictions, references) to one number, where higher is better."""


def metric_name(metric: str | Metric) -> str:
    """The name under which a metric is reported."""
    return metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__)
