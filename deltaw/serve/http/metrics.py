"""Prometheus' text of the service's figures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST

if TYPE_CHECKING:
    from deltaw.serve.service import Service

PREFIX = "deltaw_"


class Figures:
    """A collector that reads the service when it is asked."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def collect(self) -> Iterator[Any]:
        """Every figure; names that end in `_total` are counters."""
        for name, value in self.service.figures().items():
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield kind(PREFIX + name, name.removesuffix("_total").replace("_", " "), value=value)
        ended = CounterMetricFamily(PREFIX + "answers_total", "answers that ended, by reason", labels=["reason"])
        for reason, count in dict(self.service.engine.counters.finished).items():
            ended.add_metric([reason], count)
        yield ended


def exposition(service: Service) -> tuple[bytes, str]:
    """The text and its content type."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Figures(service))
    return generate_latest(registry), CONTENT_TYPE_LATEST
