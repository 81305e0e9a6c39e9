"""Sets of slots that are free, for calls from several threads: one set a call, kept between calls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..arrays import Shape
from .base import Slots


class SlotPool:
    """Gives out sets of slots by latent shape and number; at most `keep` free ones are held, the longest unused go."""

    def __init__(self, make: Callable[[Shape, int], Slots], *, keep: int) -> None:
        self._make, self._keep = make, keep
        self._free: list[Slots] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._free)

    def kept(self) -> list[Slots]:
        """The sets that are free now."""
        with self._lock:
            return list(self._free)

    @contextmanager
    def take(self, shape: Shape, count: int) -> Iterator[Slots]:
        """Slots of this shape and number for one call, their clock at zero; they come back however it ends."""
        with self._lock:
            fitting = [s for s in self._free if s.shape == shape and s.count == count]
            if fitting:
                self._free.remove(fitting[-1])
        slots = fitting[-1] if fitting else self._make(shape, count)
        slots.take_times()
        try:
            yield slots
        finally:
            with self._lock:
                self._free = [*self._free, slots][-self._keep :] if self._keep else []
