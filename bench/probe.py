"""How many cores the machine gives at this moment: virtual ones may share a physical core for seconds at a time.

Nothing inside a virtual machine tells so (no frequency, no stolen time); arithmetic on all threads at once does.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import numpy.typing as npt

ELEMENTS, CALLS = 1 << 15, 40


class CoreProbe:
    """Exponentials of arrays that fit into a core's own cache: bound by arithmetic, and free of Python's lock."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads)
        self._arrays = [(np.full(ELEMENTS, 0.5, np.float32), np.empty(ELEMENTS, np.float32)) for _ in range(threads)]

    def cores(self) -> float:
        """The work done by all threads at once over that of one thread alone, in as much time: 1.0 to `threads`."""
        alone = self._spent(1)
        return self.threads * alone / self._spent(self.threads)

    def close(self) -> None:
        self._pool.shutdown()

    def _spent(self, threads: int) -> float:
        began = time.perf_counter()
        wait([self._pool.submit(_work, *pair) for pair in self._arrays[:threads]])
        return time.perf_counter() - began


def _work(given: npt.NDArray[np.float32], out: npt.NDArray[np.float32]) -> None:
    for _ in range(CALLS):
        np.exp(given, out=out)
