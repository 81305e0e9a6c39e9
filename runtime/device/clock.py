"""Where a device's time goes: the wall clock on CPU tensors, events on CUDA, which are read when somebody asks."""

from __future__ import annotations

import time
from collections import deque
from itertools import pairwise
from typing import Any

import torch

from .base import TickTimes

MOST_MARKS = 8192
"""Of a clock that nobody reads, the oldest marks go."""


class DeviceClock:
    """Marks the stages of ticks. `mark(stage)` begins a stage and ends the one before; `""` only ends."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._marks: deque[tuple[str, Any]] = deque(maxlen=MOST_MARKS)
        self._suspended = 0

    def mark(self, stage: str) -> None:
        if not self._suspended:
            self._marks.append((stage, self._now()))

    def suspend(self) -> None:
        """Stop marking: the work that follows is captured, and its stages cannot be told apart."""
        if not self._suspended:
            self._marks.append(("graph", self._now()))
        self._suspended += 1

    def resume(self, evaluations: int) -> None:
        """The captured work of so many evaluations is enqueued; its time is shared out evenly among them."""
        self._suspended -= 1
        if not self._suspended:
            self._marks.append((f"/{evaluations}", self._now()))

    def reset(self) -> None:
        self._marks.clear()

    def read(self) -> TickTimes:
        """Milliseconds by stage since the last `reset`; waits for the device."""
        if self._on_cuda and self._marks:
            self._marks[-1][1].synchronize()
        times = TickTimes()
        for (stage, began), (following, ended) in pairwise(self._marks):
            spent = began.elapsed_time(ended) if self._on_cuda else 1e3 * (ended - began)
            if stage == "graph":
                count = int(following.removeprefix("/"))
                times.evaluations += [spent / count] * count
            elif stage == "evaluations":
                times.evaluations.append(spent)
            elif stage in ("gather", "guidance", "update"):
                setattr(times, stage, getattr(times, stage) + spent)
        return times

    def _now(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
