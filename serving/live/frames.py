"""Frames on their way to who looks at them, and figures about them."""

from __future__ import annotations

import io
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ...runtime.arrays import UInt8

WINDOW_S = 2.0
KEPT_LATENCIES = 512


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Frame:
    """A picture of a live session.

    image: uint8 [H, W, 3]. index: counts the session's frames as they were begun. input: the number of the newest
    input (change of settings or picture) that it shows. seed: of its noise. latency_ms: from that input's arrival to
    this picture; for a frame without a new input, from when it was begun.
    """

    image: UInt8
    index: int
    input: int
    seed: int
    latency_ms: float

    def jpeg(self, quality: int = 85) -> bytes:
        """The picture as a JPEG file."""
        from PIL import Image as pillow

        out = io.BytesIO()
        pillow.fromarray(self.image).save(out, "JPEG", quality=quality)
        return out.getvalue()


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveStats:
    """Figures of a live session. fps and latencies are of the last seconds, the counts since it began.

    inputs: changes and pictures that came. unchanged: pictures that showed nothing new. superseded: pictures that a
    newer one replaced before they were begun. frames: pictures made. dropped: of these, replaced before they were
    taken. failed: frames that ended in an error.
    """

    inputs: int
    unchanged: int
    superseded: int
    frames: int
    dropped: int
    failed: int
    fps: float
    latency_p50_ms: float
    latency_p99_ms: float


class Meter:
    """Counts frames and their latencies over the last `WINDOW_S` seconds. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._made: deque[float] = deque()
        self._latencies: deque[float] = deque(maxlen=KEPT_LATENCIES)
        self._lock = threading.Lock()

    def add(self, latency_ms: float) -> None:
        with self._lock:
            self._made.append(self._clock())
            self._latencies.append(latency_ms)
            self._trim()

    @property
    def fps(self) -> float:
        """Frames a second, from the first to the last one in the window."""
        with self._lock:
            self._trim()
            spent = self._made[-1] - self._made[0] if len(self._made) > 1 else 0.0
            return (len(self._made) - 1) / spent if spent > 0 else 0.0

    def percentile_ms(self, percent: int) -> float:
        """A percentile of the latencies kept, 0 when there are none."""
        with self._lock:
            kept = list(self._latencies)
        if len(kept) < 2:
            return kept[0] if kept else 0.0
        return statistics.quantiles(kept, n=100, method="inclusive")[percent - 1]

    def _trim(self) -> None:
        oldest = self._clock() - WINDOW_S
        while self._made and self._made[0] < oldest:
            self._made.popleft()


class Outbox:
    """Holds the newest frame until it is taken; an older one that nobody took is dropped. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._frame: Frame | None = None
        self._newest = -1
        self._ended: BaseException | None = None
        self.dropped = 0

    @property
    def occupied(self) -> bool:
        return self._frame is not None

    def put(self, frame: Frame) -> bool:
        """Offer a frame; one that was begun before the last one is dropped. Whether it is now the newest."""
        with self._changed:
            if frame.index < self._newest:
                self.dropped += 1
                return False
            self.dropped += self._frame is not None
            self._frame, self._newest = frame, frame.index
            self._changed.notify_all()
            return True

    def end(self, error: BaseException | None = None) -> None:
        """No more frames come; `take` raises `error`, if one is given."""
        with self._changed:
            self._ended = self._ended or error or StopIteration()
            self._changed.notify_all()

    def take(self, timeout: float | None = 0.0) -> Frame | None:
        """The newest frame, or `None` when none came within `timeout` seconds or none will come any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._frame is not None or self._ended is not None, timeout)
            frame, self._frame = self._frame, None
            if frame is None and self._ended is not None and not isinstance(self._ended, StopIteration):
                raise self._ended
            return frame
