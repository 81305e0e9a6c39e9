"""Sets of slots that are free, for calls from several threads: one set a call, kept between calls."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ..engines.base import Engine
from .slots import Slots, TickTimes

Shape = tuple[int, int, int]


class SlotPool:
    """Gives out sets of slots by latent shape and number; at most `keep` free ones are held, the longest unused go."""

    def __init__(self, engine: Engine, *, keep: int) -> None:
        self._engine, self._keep = engine, keep
        self._free: list[tuple[Shape, Slots]] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._free)

    @contextmanager
    def take(self, shape: Shape, count: int) -> Iterator[Slots]:
        """Slots of this shape and number for one call; they come back when it ends, however it ends."""
        with self._lock:
            fitting = [f for f in self._free if f[0] == shape and f[1].count == count]
            if fitting:
                self._free.remove(fitting[-1])
        slots = fitting[-1][1] if fitting else Slots(self._engine, slots=count, shape=shape)
        slots.times = TickTimes()
        try:
            yield slots
        finally:
            with self._lock:
                self._free = [*self._free, (shape, slots)][-self._keep :] if self._keep else []
