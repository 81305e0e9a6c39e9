"""What Prometheus reads: histograms of the stages, counters of outcomes, and the server's figures when it asks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from .service import Service

STATES = ("starting", "ready", "draining", "failed", "closed")
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)


class Metrics:
    """An observer with a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        at: dict[str, Any] = {"registry": self.registry}
        self._stages = Histogram("fewstep_stage_seconds", "Seconds by stage", ["stage"], buckets=SECONDS, **at)
        self._rows = Histogram("fewstep_tick_rows", "UNet rows of a tick", buckets=ROWS, **at)
        self._padding = Counter("fewstep_padding_rows", "UNet rows evaluated for nobody", **at)
        self._ended = Counter("fewstep_requests", "Requests by outcome", ["outcome"], **at)
        self._rejected = Counter("fewstep_rejections", "Refused requests by reason", ["reason"], **at)
        self._ticked = Counter("fewstep_tick_seconds", "Seconds spent in ticks", **at)
        self._asked = Counter(
            "fewstep_model_requests", "Requests by model, resident or not", ["model", "resident"], **at
        )
        self._loads = Counter("fewstep_model_loads", "Times that a model was loaded", ["model"], **at)
        self._loading = Counter("fewstep_model_load_seconds", "Seconds in which models were loaded", ["model"], **at)
        self._left = Counter(
            "fewstep_model_departures", "Times that a model made room or was unloaded", ["model"], **at
        )
        self._http = Counter("fewstep_http_responses", "Responses by route and status", ["route", "status"], **at)

    def observe(self, stage: str, took_ms: float) -> None:
        self._stages.labels(stage).observe(1e-3 * took_ms)

    def tick(self, took_ms: float, *, rows: int, bucket: int, slots: int) -> None:
        self.observe("tick", took_ms)
        self._ticked.inc(1e-3 * took_ms)
        self._rows.observe(rows)
        self._padding.inc(bucket - rows)

    def ended(self, outcome: str, took_ms: float) -> None:
        self._ended.labels(outcome).inc()
        self.observe("total", took_ms)

    def rejected(self, reason: str) -> None:
        self._rejected.labels(reason).inc()

    def model_used(self, name: str, *, resident: bool) -> None:
        self._asked.labels(name, str(resident).lower()).inc()

    def model_loaded(self, name: str, took_ms: float) -> None:
        self._loads.labels(name).inc()
        self._loading.labels(name).inc(1e-3 * took_ms)

    def model_left(self, name: str) -> None:
        self._left.labels(name).inc()

    def responded(self, route: str, status: int) -> None:
        self._http.labels(route, str(status)).inc()

    def watch(self, service: Service) -> None:
        """Let the registry ask the service's figures when it is read."""
        self.registry.register(_ServerFigures(service))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _ServerFigures(Collector):
    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterable[Any]:
        state = GaugeMetricFamily("fewstep_state", "1 for the state the service is in", labels=["state"])
        for name in STATES:
            state.add_metric([name], float(self._service.state == name))
        yield state
        residents = self._service.residents
        loaded = GaugeMetricFamily("fewstep_model_loaded", "1 for a model that is loaded", labels=["model"])
        servers = residents.servers()
        for name in residents.names:
            loaded.add_metric([name], float(name in servers))
        yield loaded
        yield GaugeMetricFamily("fewstep_model_bytes", "Estimated bytes of the loaded models", value=residents.nbytes)
        if not servers:
            return
        stats = [s.stats() for s in servers.values()]
        rows, padding = sum(s.rows for s in stats), sum(s.padding for s in stats)
        for name, words, value in (
            ("outstanding", "Requests accepted and not settled", sum(s.outstanding for s in stats)),
            ("waiting", "Requests without a slot", sum(s.waiting for s in stats)),
            ("slots_in_use", "Images in progress", sum(s.slots_in_use for s in stats)),
            ("slots", "Images that may be in progress, by size and model", max(s.most_slots for s in stats)),
            ("work_seconds", "Estimated seconds until all accepted work is done", sum(s.work_s for s in stats)),
            ("utilisation", "Share of evaluated rows that were somebody's", rows / (rows + padding) if rows else 0.0),
        ):
            yield GaugeMetricFamily(f"fewstep_{name}", words, value=float(value))
