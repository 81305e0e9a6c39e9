"""Turns: engines that use every core at once go one after the other, instead of each making the other twice as slow."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """Who has the machine. What finishes or begins a request goes before what moves all of them on.

    taken: whether turns are taken at all; without, everybody runs at once, as on a device with queues of its own.
    """

    def __init__(self, *, taken: bool) -> None:
        self.taken = taken
        self._changed = threading.Condition()
        self._waiting_first = 0
        self._running = False

    @contextmanager
    def first(self) -> Iterator[None]:
        """For encoding and decoding: waits for whatever runs now."""
        if not self.taken:
            yield
            return
        with self._changed:
            self._waiting_first += 1
            self._changed.wait_for(lambda: not self._running)
            self._waiting_first -= 1
            self._running = True
        try:
            yield
        finally:
            self._end()

    @contextmanager
    def last(self) -> Iterator[None]:
        """For ticks: waits until nobody else wants a turn."""
        if not self.taken:
            yield
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._running and not self._waiting_first)
            self._running = True
        try:
            yield
        finally:
            self._end()

    def _end(self) -> None:
        with self._changed:
            self._running = False
            self._changed.notify_all()
