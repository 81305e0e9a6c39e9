"""The noise of samplers that draw it, so that few steps and many can be compared image by image.

A sampler of the reverse diffusion draws for the step from sigma to sigma' a unit noise n with x' = ... + g n,
g^2 = sigma'^2 (1 - sigma'^2 / sigma^2). Two such steps make the noise of one over both if n is the increment of a
Brownian motion in u = 1 / sigma^2, n = (B(u') - B(u)) / sqrt(u' - u); then few steps and many solve the same equation
along the same path. Students that were distilled to draw (LCM, TCD) are given one noise throughout instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ..errors import UnsupportedError
from ..runtime.arrays import Float32
from ..schedules import Program
from ..schedules.solvers.registry import find_sampler
from .problem import Pairs

DEPTH = 18
"""The path is drawn at 2^18 levels, equally apart in ln(sigma)."""
ONE_NOISE = ("lcm", "tcd")


class BrownianDraws:
    """Paths of Brownian motion in 1 / sigma^2, a path a pair, by bisection: the same at a level whoever asks when."""

    def __init__(self, low: float, high: float, seed: int) -> None:
        self._low, self._high, self._seed = low, high, seed

    def __call__(self, pairs: Pairs, program: Program) -> Callable[[], Float32]:
        noises = iter([self._between(pairs, float(a), float(b)) for a, b in self._steps(program)])
        return lambda: next(noises)()

    @staticmethod
    def _steps(program: Program) -> list[tuple[float, float]]:
        levels = program.sigmas
        return [(levels[i], levels[i + 1]) for i in range(program.evaluations) if program.draws[i]]

    def _between(self, pairs: Pairs, here: float, there: float) -> Callable[[], Float32]:
        if there == 0.0:
            return lambda: np.zeros_like(pairs.gaussians)

        def draw() -> Float32:
            i, j = self._place(here), self._place(there)
            if i == j:
                return np.zeros_like(pairs.gaussians)
            apart = self._value(pairs, j) - self._value(pairs, i)
            return np.asarray(apart / np.float32(math.sqrt(self._time(j) - self._time(i))))

        return draw

    def _place(self, sigma: float) -> int:
        share = math.log(self._high / sigma) / math.log(self._high / self._low)
        return round(min(max(share, 0.0), 1.0) * (1 << DEPTH))

    def _time(self, place: int) -> float:
        """u = 1 / sigma^2 there."""
        return float((self._high * (self._low / self._high) ** (place / (1 << DEPTH))) ** -2)

    def _value(self, pairs: Pairs, place: int) -> Float32:
        """B(u), 0 at the highest level: from the ends inwards, each middle given its two sides (Brownian bridge)."""
        left, right = 0, (1 << DEPTH)
        at_left = np.zeros_like(pairs.gaussians)
        at_right = self._unit(pairs, right) * np.float32(math.sqrt(self._time(right) - self._time(left)))
        while place not in (left, right):
            middle = (left + right) // 2
            t, a, b = self._time(middle), self._time(left), self._time(right)
            share, deviation = (t - a) / (b - a), math.sqrt((t - a) * (b - t) / (b - a))
            value = (
                at_left + np.float32(share) * (at_right - at_left) + np.float32(deviation) * self._unit(pairs, middle)
            )
            left, at_left, right, at_right = (
                (left, at_left, middle, value) if place <= middle else (middle, value, right, at_right)
            )
        return at_left if place == left else at_right

    def _unit(self, pairs: Pairs, place: int) -> Float32:
        """Unit noise that belongs to a place of a pair's path."""
        shape = pairs.gaussians.shape[1:]
        return np.stack(
            [np.random.default_rng((self._seed, int(i), place)).standard_normal(shape, np.float32) for i in pairs.index]
        )


class OneNoise:
    """The same noise at each draw of a pair."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __call__(self, pairs: Pairs, program: Program) -> Callable[[], Float32]:
        shape = pairs.gaussians.shape[1:]
        drawn = [np.random.default_rng((self._seed, int(i))).standard_normal(shape, np.float32) for i in pairs.index]
        noise = np.stack(drawn)
        return lambda: noise


def draws_of(
    sampler: str, low: float, high: float, seed: int
) -> Callable[[Pairs, Program], Callable[[], Float32]] | None:
    """What a sampler draws in a search, `None` for one that draws nothing; `UnsupportedError` for two-stage ones."""
    chosen = find_sampler(sampler)
    if chosen.draws == "never" or chosen.draws.startswith("with"):
        return None
    if sampler in ONE_NOISE:
        return OneNoise(seed)
    if chosen.stages != 1:
        raise UnsupportedError(
            f"a search for {sampler}, whose two stages share a noise",
            expected="a sampler of one stage, or without noise",
        )
    return BrownianDraws(low, high, seed)
