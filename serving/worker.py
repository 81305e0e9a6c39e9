"""A thread that does jobs beside the ticks, the most urgent first."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections.abc import Callable

log = logging.getLogger("fewstep.serving")

Job = Callable[[], None]


class DueWorker:
    """Runs jobs one at a time, in the order of their due times.

    A job settles what it is for; one that raises all the same is logged, and the next is run.
    """

    def __init__(self, name: str) -> None:
        self._jobs: queue.PriorityQueue[tuple[float, int, Job | None]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, due: float, job: Job) -> None:
        self._jobs.put((due, next(self._numbers), job))

    def close(self, timeout: float | None = None) -> None:
        """Stop after the jobs that are queued."""
        self._jobs.put((float("inf"), next(self._numbers), None))
        self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            _, _, job = self._jobs.get()
            if job is None:
                return
            try:
                job()
            except BaseException:  # libraries in Rust raise what is no Exception
                log.exception("a job of %s failed", self._thread.name)
