"""How many cores the machine gives at this moment: virtual ones may share a physical core for seconds at a time.

Nothing inside a virtual machine tells so (no frequency, no stolen time); arithmetic on all threads at once does.
Threads that the system inside puts on one processor are another matter: those of the probe have one each.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import numpy.typing as npt

ELEMENTS, CALLS, TURNS = 1 << 15, 100, 3


class CoreProbe:
    """Exponentials of arrays that fit into a core's own cache: bound by arithmetic, and free of Python's lock."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pools = [ThreadPoolExecutor(1, initializer=_settle, initargs=(i,)) for i in range(threads)]
        self._arrays = [(np.full(ELEMENTS, 0.5, np.float32), np.empty(ELEMENTS, np.float32)) for _ in range(threads)]

    def cores(self) -> float:
        """The work done by all threads at once over that of one thread alone, in as much time: 1.0 to `threads`.

        The shortest of a few turns counts each time: a turn can only be held up.
        """
        turns = [(self._spent(1), self._spent(self.threads)) for _ in range(TURNS)]
        return self.threads * min(one for one, _ in turns) / min(all_ for _, all_ in turns)

    def close(self) -> None:
        for pool in self._pools:
            pool.shutdown()

    def _spent(self, threads: int) -> float:
        began = time.perf_counter()
        wait([p.submit(_work, *a) for p, a in zip(self._pools[:threads], self._arrays, strict=False)])
        return time.perf_counter() - began


def _settle(index: int) -> None:
    """Give this thread a processor of its own, where the system has such calls: a scheduler may put two on one."""
    if hasattr(os, "sched_getaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {allowed[index % len(allowed)]})


def _work(given: npt.NDArray[np.float32], out: npt.NDArray[np.float32]) -> None:
    for _ in range(CALLS):
        np.exp(given, out=out)
