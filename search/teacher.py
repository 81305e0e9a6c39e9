"""The teacher: the same network in many steps, and its trajectories, which every method learns from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..runtime.arrays import Float32
from ..schedules import compile_program
from ..schedules.spacing import karras
from .network import Floats
from .problem import Knots, Pairs, Problem, Walk, run_together

TEACHER = "dpmpp_2m"
"""Second order, and every deterministic sampler's limit."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trajectories:
    """States of a set of pairs on a falling grid of levels: float32 [m + 1, N, *shape], the last one the result.

    sigmas [m + 1], the last one 0. states: the network's inputs, x = alpha x0 + s noise. x0 [m, N, *shape]: the
    network's estimates there.
    """

    pairs: Pairs
    sigmas: Floats
    states: Float32
    x0: Float32

    def unscaled(self, i: int) -> Float32:
        """x0 + sigma noise at grid level i."""
        return np.asarray(self.states[i] * np.float32(np.sqrt(1.0 + self.sigmas[i] ** 2)))

    def at(self, sigma: float) -> Float32:
        """The states at any level, [N, *shape]: cubic in sigma between grid levels, whose slopes are known there.

        dx/dsigma = (x - x0) / sigma in x = x0 + sigma noise (the probability flow of arXiv 2206.00364, eq. 1).
        """
        if sigma == 0.0:
            return np.asarray(self.states[-1])
        i = int(np.clip(np.searchsorted(-self.sigmas, -sigma, side="right") - 1, 0, len(self.sigmas) - 2))
        high, low = float(self.sigmas[i]), float(self.sigmas[i + 1])
        x, y = self.unscaled(i), self.unscaled(i + 1)
        if low == 0.0:  # the last step of every sampler is first order
            state = y + (x - y) * np.float32(sigma / high)
        else:
            u = (high - sigma) / (high - low)
            dx, dy = (x - self.x0[i]) / np.float32(high), (y - self.x0[i + 1]) / np.float32(low)
            width = low - high
            parts = (2 * u**3 - 3 * u**2 + 1, (u**3 - 2 * u**2 + u) * width, 3 * u**2 - 2 * u**3, (u**3 - u**2) * width)
            state = sum(np.float32(p) * q for p, q in zip(parts, (x, dx, y, dy), strict=True))
        return np.asarray(state * np.float32(1.0 / np.sqrt(1.0 + sigma**2)), np.float32)

    def first(self, count: int) -> Trajectories:
        """Those of at most so many pairs."""
        return replace(self, pairs=self.pairs.first(count), states=self.states[:, :count], x0=self.x0[:, :count])


def teacher_knots(problem: Problem, steps: int) -> Knots:
    """Levels of the teacher's steps, as Karras et al. 2022 space them (eq. 5), which converges soonest here."""
    sigmas = karras(*problem.range, steps)
    return Knots(name="teacher", sigmas=(*map(float, sigmas), 0.0))


def teach(problem: Problem, pairs: Pairs, steps: int) -> Pairs:
    """The pairs with the teacher's results."""
    program = compile_program(TEACHER, sigmas=teacher_knots(problem, steps).sigmas, noise=problem.noise)
    return replace(pairs, finals=replace(problem, draws=None).run([(program, pairs)])[0])


def follow_teacher(problem: Problem, pairs: Pairs, steps: int) -> Trajectories:
    """Run the teacher and keep every state."""
    knots = teacher_knots(problem, steps)
    program = compile_program(TEACHER, sigmas=knots.sigmas, noise=problem.noise)
    states: list[Float32] = []
    outs: list[Float32] = []

    def watched(walk: Walk) -> Walk:
        asked = next(walk)
        while True:
            out = yield asked
            states.append(np.array(asked[0], np.float32))
            outs.append(np.array(out, np.float32))
            try:
                asked = walk.send(out)
            except StopIteration as end:
                return np.asarray(end.value)

    walk = watched(program.walk(pairs.gaussians, lambda: np.zeros_like(pairs.gaussians)))
    (result,) = run_together(problem.network, [(walk, pairs.index)])
    sigmas = np.array(knots.sigmas)
    x0 = [problem.x0(x, out, np.full(len(x), s)) for x, out, s in zip(states, outs, sigmas, strict=False)]
    return Trajectories(
        pairs=replace(pairs, finals=result), sigmas=sigmas, states=np.stack([*states, result]), x0=np.stack(x0)
    )
