"""Live sessions in a server's Prometheus registry."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from .hub import LiveHub

SECONDS = (0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0)


class LiveMetrics:
    """A hub's observer: the latency of each frame from its input, and what became of inputs without one."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._latency = Histogram(
            "fewstep_live_latency_seconds", "Seconds from an input to its frame", buckets=SECONDS, registry=registry
        )
        self._lost = Counter("fewstep_live_lost", "Inputs without a frame, by reason", ["reason"], registry=registry)

    def frame(self, latency_ms: float) -> None:
        self._latency.observe(1e-3 * latency_ms)

    def lost(self, reason: str) -> None:
        self._lost.labels(reason).inc()

    def watch(self, hub: LiveHub) -> None:
        """Let the registry ask the hub's figures when it is read."""
        self._registry.register(_LiveFigures(hub))


class _LiveFigures(Collector):
    def __init__(self, hub: LiveHub) -> None:
        self._hub = hub

    def collect(self) -> Iterable[Any]:
        stats = self._hub.stats()
        yield GaugeMetricFamily("fewstep_live_sessions", "Live sessions that are open", value=float(stats.sessions))
        yield GaugeMetricFamily("fewstep_live_fps", "Frames a second, of all live sessions", value=stats.fps)
        yield CounterMetricFamily("fewstep_live_opened", "Live sessions opened", value=float(stats.opened))
        yield CounterMetricFamily("fewstep_live_refused", "Live sessions refused", value=float(stats.refused))
