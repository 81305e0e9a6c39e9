"""Sets of slots that are free, for calls from several threads: one set a call, kept between calls."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ...engines.base import Engine
from ...errors import MismatchError
from .numpy_slots import Slots, TickTimes

Shape = tuple[int, int, int]


class SlotPool:
    """Gives out sets of slots by latent shape and number; at most `keep` free ones are held, the longest unused go."""

    def __init__(self, engine: Engine, *, keep: int, make: Callable[[Shape, int], Any] | None = None) -> None:
        """`make` gives new slots of a shape and a number; without it they are those of the NumPy device."""
        self._keep = keep
        self._make = make or functools.partial(_numpy_slots, engine)
        self._free: list[tuple[Shape, Any]] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._free)

    def kept(self) -> list[Any]:
        """The sets that are free now."""
        with self._lock:
            return [slots for _, slots in self._free]

    def make(self, shape: Shape, count: int) -> Any:
        """New slots that the pool knows nothing of, for who keeps them."""
        return self._make(shape, count)

    @contextmanager
    def take(self, shape: Shape, count: int) -> Iterator[Any]:
        """Slots of this shape and number for one call; they come back when it ends, however it ends."""
        with self._lock:
            fitting = [f for f in self._free if f[0] == shape and f[1].count == count]
            if fitting:
                self._free.remove(fitting[-1])
        slots = fitting[-1][1] if fitting else self._make(shape, count)
        slots.times = TickTimes()
        try:
            yield slots
        finally:
            with self._lock:
                self._free = [*self._free, (shape, slots)][-self._keep :] if self._keep else []


def _numpy_slots(engine: Engine, shape: Shape, count: int) -> Slots:
    if engine.device != "cpu":
        raise MismatchError(
            f"the backend {engine.backend!r} runs on {engine.device}",
            expected="a backend for the CPU",
            remedy="Open the bundle with fewstep.load, or name a backend.",
        )
    return Slots(engine, slots=count, shape=shape)
