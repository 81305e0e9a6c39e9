"""A lock on the CPU: engines that use every core go one after the other, where each would make the other slower."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager


class CpuLock:
    """Who has the CPU. Encoding and decoding go before ticks, which move every request on.

    used: whether it locks at all; without, all run at once, as on a device with queues of its own.
    """

    def __init__(self, *, used: bool) -> None:
        self.used = used
        self._changed = threading.Condition()
        self._waiting = 0
        self._running = False

    def before_ticks(self) -> AbstractContextManager[None]:
        """For encoding and decoding: waits for whatever runs now."""
        return self._turn(first=True)

    def tick(self) -> AbstractContextManager[None]:
        """For ticks: waits until nothing else wants the CPU."""
        return self._turn(first=False)

    @contextmanager
    def _turn(self, *, first: bool) -> Iterator[None]:
        if not self.used:
            yield
            return
        with self._changed:
            self._waiting += first
            self._changed.wait_for(lambda: not self._running and (first or not self._waiting))
            self._waiting -= first
            self._running = True
        try:
            yield
        finally:
            with self._changed:
                self._running = False
                self._changed.notify_all()
