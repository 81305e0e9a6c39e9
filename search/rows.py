"""Rows fitted to a network: least squares of the teacher's next state on the student's own state and last estimates.

A sampler is a table here, so a learned one is too: it runs in slots, recordings and mixed batches on every backend
unchanged. Each row is fitted in closed form after the rows before it have been walked (student-forced), with the
sampler's own row as prior: minimise over b

    mean (y - Z b)^2 + ridge sum_k mean(Z_k^2) (b_k - b0_k)^2,

where Z has the state and what was kept of the last evaluations and b0 is the sampler's own row, which an infinite ridge
gives back. Least squares over this span: OLSS (arXiv 2305.14677).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..runtime.arrays import Float32
from ..schedules.fitted import FittedRow, Kept, kept_by, rows_of
from ..schedules.levels import Level, Preconditioning
from .problem import Knots, Problem, Walk, run_together
from .teacher import Trajectories

RIDGES = (1e-3, 1e-1, 1.0, 10.0)
DEPTH = 3
"""Evaluations that a fitted row reads."""


class Levels:
    """A candidate's levels as a walk over rows needs them: what is fed, and how the kept quantity is read there."""

    def __init__(self, problem: Problem, knots: Knots, kept: Kept) -> None:
        program = problem.program(knots.plain)
        self.sigmas = program.sigmas
        self.timesteps = program.timesteps if knots.fed is None else np.array(knots.fed)
        at = Preconditioning(prediction=problem.prediction)
        readings = [at.at(Level(0.0, float(sigma))) for sigma in self.sigmas[:-1]]
        self._factors = [(r.x0_x, r.x0_out) if kept == "x0" else (r.eps_x, r.eps_out) for r in readings]

    def __len__(self) -> int:
        return len(self.timesteps)

    def kept(self, i: int, x: npt.NDArray[Any], out: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """What is kept of evaluation i."""
        of_x, of_out = self._factors[i]
        return of_x * x + of_out * out


def own_rows(problem: Problem, knots: Knots) -> tuple[Kept, list[FittedRow]]:
    """What the sampler keeps, and its own rows at these levels."""
    options = {**problem.options, **knots.options}
    kept = kept_by(problem.sampler, noise=problem.noise, **options)
    return kept, rows_of(problem.sampler, kept, noise=problem.noise, sigmas=knots.sigmas, **options)


def walk_rows(
    levels: Levels,
    rows: Sequence[FittedRow],
    x: npt.NDArray[Any],
    known: Sequence[npt.NDArray[Any]] = (),
    first: int = 0,
) -> Walk:
    """Walk rows from evaluation `first` on, from state x with what was kept before it, newest first."""
    history = list(known)
    for i in range(first, len(rows)):
        out = yield x, float(levels.timesteps[i])
        history = [levels.kept(i, x, out), *history[:4]]
        x = rows[i].a * x
        for factor, quantity in zip(rows[i].b, history, strict=False):
            x = x + factor * quantity
    return x


def fit_row(
    state: npt.NDArray[Any],
    known: Sequence[npt.NDArray[Any]],
    target: Float32,
    own: FittedRow,
    *,
    ridge: float,
    weights: npt.NDArray[Any],
) -> FittedRow:
    """One row by ridge least squares over all kept quantities that are known; the sampler's own at an infinite ridge.

    weights [N]: of the pairs, in their distances.
    """
    prior = np.array([own.a, *own.b, *[0.0] * (len(known) - len(own.b))])
    if math.isinf(ridge):
        return own
    by_pair = weights.reshape(-1, *(1,) * (state.ndim - 1))
    z = np.stack([np.ravel(v * by_pair) for v in (state, *known)])
    rest = np.ravel(target * by_pair) - prior @ z
    gram = z @ z.T / z.shape[1]
    change = np.linalg.solve(gram + ridge * np.diag(np.diag(gram)), z @ rest / z.shape[1])
    a, *b = prior + change
    return FittedRow(float(a), tuple(map(float, b)))


def fitting(
    levels: Levels,
    own: Sequence[FittedRow],
    trajectories: Trajectories,
    *,
    ridge: float,
    depth: int,
    weights: npt.NDArray[Any],
    into: list[FittedRow],
) -> Walk:
    """A walk that fits each row as it comes to it; the rows go into `into`."""
    x: npt.NDArray[Any] = trajectories.pairs.gaussians
    known: list[npt.NDArray[Any]] = []
    for i in range(len(levels)):
        out = yield x, float(levels.timesteps[i])
        known = [levels.kept(i, x, out), *known[: max(depth, len(own[i].b)) - 1]]
        target = trajectories.at(float(levels.sigmas[i + 1]))
        row = fit_row(x, known, target, own[i], ridge=ridge, weights=weights)
        into.append(row)
        x = row.a * x
        for factor, quantity in zip(row.b, known, strict=False):
            x = x + factor * quantity
    return x


def fit_rows(
    problem: Problem,
    candidates: Sequence[tuple[Knots, float]],
    trajectories: Trajectories,
    *,
    weights: npt.NDArray[Any] | None = None,
    depth: int = DEPTH,
) -> list[Knots]:
    """Candidates, each with a ridge, with rows fitted to the trajectories, all in shared evaluations.

    weights [N]: how much a pair's distance counts, `None`: all alike.
    """
    walks, fitted = [], []
    by_pair = np.ones(len(trajectories.pairs)) if weights is None else weights
    for knots, ridge in candidates:
        kept, own = own_rows(problem, knots)
        rows: list[FittedRow] = []
        levels = Levels(problem, knots, kept)
        walk = fitting(levels, own, trajectories, ridge=ridge, depth=depth, weights=by_pair, into=rows)
        walks.append((walk, trajectories.pairs.index))
        fitted.append((knots, kept, rows))
    run_together(problem.network, walks)
    return [replace(knots, kept=kept, rows=tuple(rows)) for knots, kept, rows in fitted]
