"""Whether an input picture shows anything new."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from ...runtime.arrays import UInt8

CELLS = 16


def cell_means(image: UInt8, cells: int = CELLS) -> np.ndarray:
    """Means of uint8 [H, W, 3] over a grid of at most cells x cells, float32 [cells, cells, 3], in levels of 255."""
    rows = np.linspace(0, image.shape[0], min(cells, image.shape[0]) + 1).astype(int)
    columns = np.linspace(0, image.shape[1], min(cells, image.shape[1]) + 1).astype(int)
    sums = np.add.reduceat(image, rows[:-1], axis=0, dtype=np.float32)
    sums = np.add.reduceat(sums, columns[:-1], axis=1)
    areas = np.diff(rows)[:, None] * np.diff(columns)[None]
    means: np.ndarray = sums / areas[..., None].astype(np.float32)
    return means


class UnchangedFilter:
    """Passes pictures that differ from the last one that passed, and the same one again every `refresh_s`.

    Pictures are alike when no cell of a 16 x 16 grid differs in its mean by `threshold` levels of 255 in any channel:
    means are deaf to a camera's grain and hear a stroke in one corner. The comparison is with what passed last, so
    that slow changes add up. A threshold of 0 passes everything.
    """

    def __init__(
        self, *, threshold: float = 2.0, refresh_s: float = 1.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.threshold, self.refresh_s = threshold, refresh_s
        self._clock = clock
        self._last: np.ndarray | None = None
        self._passed_at = 0.0

    def passes(self, image: UInt8) -> bool:
        """Whether uint8 [H, W, 3] is to be computed; if so it is what the next ones are compared with."""
        now = self._clock()
        means = cell_means(image)
        last = self._last
        alike = (
            last is not None
            and last.shape == means.shape
            and float(np.abs(means - last).max()) < self.threshold
            and now - self._passed_at < self.refresh_s
        )
        if not alike:
            self._last, self._passed_at = means, now
        return not alike

    def forget(self) -> None:
        """Pass the next picture whatever it shows."""
        self._last = None
