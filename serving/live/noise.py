"""Unit noise that changes from frame to frame: not at all, along a path, or altogether."""

from __future__ import annotations

import math
from collections import OrderedDict

import numpy as np

from ...errors import ArgumentError
from ...runtime.arrays import Float32
from ...runtime.noise.seeds import TorchCpuGenerator

MODES = ("fixed", "walk", "fresh")
KEPT = 8


class NoisePath:
    """A path through unit noise, float32 of `shape`, that begins at seed's noise and passes the next seeds' in turn.

    Between two of them it follows the great circle, cos(a) g0 + sin(a) g1 with a from 0 to pi/2: for independent
    unit Gaussians every point of it is unit Gaussian again, where a straight line would lose variance. `skip` draws
    of each generator are left out first, as a request that starts from a picture leaves out its latent's.
    """

    def __init__(self, shape: tuple[int, ...], *, skip: int = 0) -> None:
        self._shape, self._skip = shape, skip
        self._kept: OrderedDict[int, Float32] = OrderedDict()

    def at(self, seed: int, position: float) -> Float32:
        """The noise `position` seeds along the path; at whole numbers it is exactly that seed's."""
        if not (math.isfinite(position) and position >= 0):
            raise ArgumentError(f"position is {position}", expected="a finite number of at least 0")
        whole = math.floor(position)
        angle = (position - whole) * math.pi / 2
        first = self._noise(seed + whole)
        if angle == 0.0:
            return first
        return np.float32(math.cos(angle)) * first + np.float32(math.sin(angle)) * self._noise(seed + whole + 1)

    def _noise(self, seed: int) -> Float32:
        if seed not in self._kept:
            generator = TorchCpuGenerator(seed % 2**64)
            for _ in range(self._skip):
                generator.randn(self._shape)
            self._kept[seed] = generator.randn(self._shape)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return self._kept[seed]
