"""Dynamic programming on the teacher's trajectories: where to step, for every number of steps at once.

What a step from level j to level k misses, started on the trajectory, is known without asking the network again: the
sampler's own row there is linear in the state, in what is kept at j and, of a multistep sampler, at the level i before.
So with the inner products of all of them over the pairs,

    cost[i, j, k] = w_k mean || a x_j + b_0 H_j + b_1 H_i - x_k ||^2,

and the least sum over paths of n steps is found exactly, by the last two levels (GITS, arXiv 2405.11326, with the
sampler's own rows for its Euler's). w_k is how much of an error made at k is left in the result, measured once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..runtime.arrays import Float32
from ..schedules.fitted import FittedRow, rows_of
from ..schedules.levels import Level, Preconditioning
from .network import Floats, Integers
from .problem import Knots, Pairs, Problem
from .rows import own_rows
from .teacher import Trajectories, teacher_knots

GRID = 40
"""Levels among which steps may lie; compiling all rows of three levels is most of the work."""
PROBES = 8
FINISH = 10
PROBED_PAIRS = 16
"""Levels at which an error is made to see what is left of it, the steps from there to the end, and pairs at most."""


def find_on_trajectories(problem: Problem, trajectories: Trajectories, counts: Sequence[int]) -> dict[int, Knots]:
    """By number of steps, the levels of least summed cost; trajectories: of deterministic samplers."""
    chosen = np.unique(np.round(np.linspace(0, len(trajectories.sigmas) - 2, GRID)).astype(int))
    grid = [*chosen, len(trajectories.sigmas) - 1]
    sigmas = [float(trajectories.sigmas[i]) for i in grid]
    costs = _Costs(problem, trajectories, grid)
    weights = _sensitivity(problem, trajectories, grid, costs)
    paths = _shortest(costs, weights, max(counts))
    return {n: Knots(name="trajectory", sigmas=tuple(sigmas[i] for i in paths[n])) for n in counts if n in paths}


class _Costs:
    """Mean squares of what the sampler's rows miss between grid levels."""

    def __init__(self, problem: Problem, trajectories: Trajectories, grid: Sequence[int]) -> None:
        self._problem = problem
        self.sigmas = [float(trajectories.sigmas[i]) for i in grid]
        self.count = len(grid)
        self._kept, _ = own_rows(problem, teacher_knots(problem, 4))
        states = [trajectories.states[i] for i in grid]
        kept = [self.read(trajectories, i) for i in grid[:-1]]
        vectors = np.stack([np.ravel(v) for v in (*states, *kept)]).astype(np.float64)
        self.gram = vectors @ vectors.T / vectors.shape[1]
        self.multistep = len(self.row(0, 1, 2).b) > 1

    def read(self, trajectories: Trajectories, i: int) -> Float32:
        """What the sampler keeps at a teacher's level."""
        x0 = trajectories.x0[i]
        if self._kept == "x0":
            return np.asarray(x0)
        at = Preconditioning(prediction="sample").at(Level(0.0, float(trajectories.sigmas[i])))
        return np.asarray(at.eps_x * trajectories.states[i] + at.eps_out * x0)

    def row(self, i: int | None, j: int, k: int) -> FittedRow:
        """The sampler's own row from j to k, after a step from i; the first one where there is none."""
        end = self.sigmas[k]
        sigmas = [self.sigmas[j], end] if i is None else [self.sigmas[i], self.sigmas[j], end]
        tail = [] if end == 0.0 else [0.5 * end]
        problem = self._problem
        rows = rows_of(problem.sampler, self._kept, noise=problem.noise, sigmas=[*sigmas, *tail], **problem.options)
        return rows[len(sigmas) - 2]

    def of(self, i: int | None, j: int, k: int) -> float:
        """The cost of the step from j to k after one from i."""
        row = self.row(i, j, k)
        places = [j, self.count + j, *([] if i is None else [self.count + i])][: 1 + len(row.b)]
        factors = np.array([row.a, *row.b, -1.0])
        inner = self.gram[np.ix_([*places, k], [*places, k])]
        return max(float(factors @ inner @ factors), 0.0)


def _sensitivity(problem: Problem, trajectories: Trajectories, grid: Sequence[int], costs: _Costs) -> Floats:
    """By grid level, the mean square left in the result of a unit one in the state there.

    Measured where jumps of the sampler land beside the trajectory, and between in ln(sigma).
    """
    few = trajectories.first(PROBED_PAIRS)
    ends = range(4, len(grid) - 4, max(1, (len(grid) - 8) // PROBES))
    asked, sizes = [], []
    for k in ends:
        sigma, j = costs.sigmas[k], k - 3
        row = costs.row(None, j, k)
        landed = row.a * few.states[grid[j]] + row.b[0] * costs.read(few, grid[j])
        levels = np.exp(np.linspace(np.log(sigma), np.log(costs.sigmas[-2]), FINISH))
        program = problem.program(Knots(name="finish", sigmas=(*map(float, levels), 0.0)))
        for states in (few.states[grid[k]], np.asarray(landed, np.float32)):
            asked.append((program, Pairs(index=few.pairs.index, gaussians=states)))
        sizes.append(float(np.mean((landed - few.states[grid[k]]) ** 2)))
    ended = problem.run(asked)
    left = [float(np.mean((b - a) ** 2)) for a, b in zip(ended[::2], ended[1::2], strict=True)]
    logs = np.log(np.maximum(costs.sigmas, 1e-6))[::-1]
    places = [np.log(costs.sigmas[k]) for k in ends]
    amplified = [np.log(max(a, 1e-12) / max(s, 1e-12)) for a, s in zip(left, sizes, strict=True)]
    weights = np.exp(np.interp(logs, places[::-1], amplified[::-1]))[::-1]
    weights[-1] = 1.0
    return np.asarray(weights)


@dataclass(frozen=True, slots=True)
class _Best:
    """By the last two levels of a path of some steps, its least cost, and the level before."""

    cost: Floats
    before: Integers


def _shortest(costs: _Costs, weights: Floats, most: int) -> dict[int, tuple[int, ...]]:
    """By number of steps, the path of least cost from the first grid level to the last."""
    m = costs.count
    first = np.full((m, m), np.inf)
    for k in range(1, m):
        first[0, k] = weights[k] * costs.of(None, 0, k)
    step = np.full((m, m, m), np.inf)
    for j in range(1, m - 1):
        for k in range(j + 1, m):
            if costs.multistep:
                step[:j, j, k] = [weights[k] * costs.of(i, j, k) for i in range(j)]
            else:
                step[:j, j, k] = weights[k] * costs.of(None, j, k)
    table = [_Best(first, np.full((m, m), -1))]
    for _ in range(1, most):
        # V_{n+1}(j, k) = min_i V_n(i, j) + cost(i, j, k)
        reached = table[-1].cost[:, :, None] + step
        before = np.argmin(reached, axis=0)
        table.append(_Best(np.min(reached, axis=0), before))
    paths = {}
    for n, best in enumerate(table, start=1):
        j = int(np.argmin(best.cost[:, m - 1]))
        if not np.isfinite(best.cost[j, m - 1]):
            continue
        path = [m - 1, j]
        for earlier in reversed(table[1:n]):
            path.append(int(earlier.before[path[-1], path[-2]]))
        paths[n] = tuple(reversed(path))
    return paths
