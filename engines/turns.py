"""Use by many threads, or change by one: whoever would change what others use waits for them, and they for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """A thread that uses something already may do so again at once; those that come while a change waits come after it.

    Who uses several things takes them in one order everywhere, or two changes at once may hold two users for good.
    """

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._users = self._waiting = 0
        self._changing = False
        self._own = threading.local()

    @contextmanager
    def using(self) -> Iterator[bool]:
        """Whether this is the thread's outermost use."""
        depth: int = getattr(self._own, "depth", 0)
        if not depth:
            with self._free:
                self._free.wait_for(lambda: not self._changing and not self._waiting)
                self._users += 1
        self._own.depth = depth + 1
        try:
            yield not depth
        finally:
            self._own.depth = depth
            if not depth:
                with self._free:
                    self._users -= 1
                    self._free.notify_all()

    @contextmanager
    def changing(self) -> Iterator[None]:
        with self._free:
            self._waiting += 1
            try:
                self._free.wait_for(lambda: not self._users and not self._changing)
                self._changing = True
            finally:
                self._waiting -= 1
                self._free.notify_all()
        try:
            yield
        finally:
            with self._free:
                self._changing = False
                self._free.notify_all()
