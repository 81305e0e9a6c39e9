"""A lock on the CPU: engines that use every core go one after the other, where each would make the other slower."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class CpuLock:
    """Who has the CPU. Encoding and decoding go before ticks, which move every request on.

    used: whether it locks at all; without, all run at once, as on a device with queues of its own.
    """

    def __init__(self, *, used: bool) -> None:
        self.used = used
        self._changed = threading.Condition()
        self._waiting = 0
        self._running = False

    @contextmanager
    def before_ticks(self) -> Iterator[None]:
        """For encoding and decoding: waits for whatever runs now."""
        if not self.used:
            yield
            return
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: not self._running)
            self._waiting -= 1
            self._running = True
        try:
            yield
        finally:
            self._end()

    @contextmanager
    def tick(self) -> Iterator[None]:
        """For ticks: waits until nothing else wants the CPU."""
        if not self.used:
            yield
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._running and not self._waiting)
            self._running = True
        try:
            yield
        finally:
            self._end()

    def _end(self) -> None:
        with self._changed:
            self._running = False
            self._changed.notify_all()
