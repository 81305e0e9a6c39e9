"""What a server tells about itself: to an observer as it happens, and as figures when asked."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Protocol


class Observer(Protocol):
    """Gets every measurement, from several threads. It must be quick and must not raise."""

    def observe(self, stage: str, took_ms: float) -> None:
        """So many milliseconds of `queue`, `text`, `encode_image`, `tick`, `decode`, or of the request in `total`."""

    def tick(self, took_ms: float, *, rows: int, bucket: int, slots: int) -> None:
        """A tick advanced so many slots with `rows` UNet rows in an evaluation of `bucket` rows."""

    def ended(self, outcome: str, took_ms: float) -> None:
        """A request was settled: `"ok"`, or the name of its error's type."""

    def rejected(self, reason: str) -> None:
        """A request was not accepted: the name of its error's type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStats:
    """Figures of a server since it started.

    accepted, rejected, finished, failed, cancelled, late: requests. outstanding: accepted and not settled; waiting:
    of these, prepared and without a slot. slots_in_use, most_slots: images (most_slots by shape). ticks; rows and
    padding: UNet rows evaluated for somebody and for nobody. tick_s: seconds spent in ticks. work_s: estimate of the
    seconds until everything accepted is done. buckets: rows to milliseconds, by image size.
    """

    state: str
    accepted: int
    rejected: int
    finished: int
    failed: int
    cancelled: int
    late: int
    outstanding: int
    waiting: int
    slots_in_use: int
    most_slots: int
    ticks: int
    rows: int
    padding: int
    tick_s: float
    work_s: float
    buckets: dict[str, dict[int, float]]

    @property
    def utilisation(self) -> float:
        """Share of the evaluated rows that were somebody's."""
        return self.rows / (self.rows + self.padding) if self.rows else 0.0


class Counters:
    """The figures behind `ServerStats`; passes everything on to an observer."""

    def __init__(self, observer: Observer | None) -> None:
        self._next = observer
        self._lock = threading.Lock()
        self.ticks = self.rows = self.padding = 0
        self.tick_ms = 0.0
        self.outcomes: dict[str, int] = {}
        self.rejections: dict[str, int] = {}

    def observe(self, stage: str, took_ms: float) -> None:
        if self._next is not None:
            self._next.observe(stage, took_ms)

    def tick(self, took_ms: float, *, rows: int, bucket: int, slots: int) -> None:
        self.ticks += 1
        self.rows += rows
        self.padding += bucket - rows
        self.tick_ms += took_ms
        if self._next is not None:
            self._next.tick(took_ms, rows=rows, bucket=bucket, slots=slots)

    def ended(self, outcome: str, took_ms: float) -> None:
        with self._lock:
            self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        if self._next is not None:
            self._next.ended(outcome, took_ms)

    def rejected(self, reason: str) -> None:
        with self._lock:
            self.rejections[reason] = self.rejections.get(reason, 0) + 1
        if self._next is not None:
            self._next.rejected(reason)
