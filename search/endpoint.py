"""Descent on the distance of the result to the teacher's: levels, timesteps fed, rows; forward evaluations alone.

The distance is a sum of squares, so its own method is Gauss's and Newton's with Levenberg's damping: the derivative of
the results by each number is taken by a forward difference, one candidate a number, and all candidates of a round are
rows of shared batches, from common noise. A round of p numbers costs about (p + 4) n N evaluations and gains what tens
of sweeps of one number after another would. After each round pairs that are not descended on judge, and the best that
they saw is kept, since descent overfits its pairs and its solver.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..runtime.arrays import Float32
from ..schedules.fitted import FittedRow
from .network import Floats
from .problem import Knots, Pairs, Problem, Walk, mean_distance, run_together, square_distances
from .rows import Levels, own_rows, walk_rows

DAMPINGS = (1e-3, 3e-2, 0.3, 3.0, 30.0)
LEAST_GAIN = 0.003
"""Share of the error by which a round must gain on the pairs that judge, to be followed by another."""


class Freedom(Protocol):
    """Some numbers of a candidate as a vector, and the candidate with other ones; `None` where there is no such."""

    def read(self, knots: Knots) -> Floats: ...

    def write(self, knots: Knots, values: Floats) -> Knots | None: ...

    @property
    def difference(self) -> float:
        """By how much a number is moved for its derivative."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InnerLevels:
    """ln(sigma) of every level but the first and the last, which stay; fitted rows keep their distance to the sampler's
    own, which move with the levels."""

    problem: Problem
    difference: float = 0.02

    def read(self, knots: Knots) -> Floats:
        return np.log(knots.sigmas[1:-1])

    def write(self, knots: Knots, values: Floats) -> Knots | None:
        sigmas = (knots.sigmas[0], *map(float, np.exp(values)), knots.sigmas[-1])
        if any(a <= 1.01 * b for a, b in itertools.pairwise(sigmas)):
            return None
        moved = replace(knots, sigmas=sigmas)
        return moved if knots.rows is None else moved_rows(self.problem, knots, moved)


@dataclass(frozen=True, slots=True, kw_only=True)
class FedTimesteps:
    """The timesteps fed, in hundreds, apart from those of the levels (as LD3 decouples them, arXiv 2405.15506)."""

    problem: Problem
    difference: float = 0.05

    def _own(self, knots: Knots) -> Floats:
        return self.problem.timesteps(knots.sigmas[:-1])

    def read(self, knots: Knots) -> Floats:
        return (np.array(knots.fed) if knots.fed is not None else self._own(knots)) / 100.0

    def write(self, knots: Knots, values: Floats) -> Knots | None:
        fed = np.clip(100.0 * values, 0.0, len(self.problem.noise) - 1.0)
        return replace(knots, fed=tuple(map(float, fed)))


@dataclass(frozen=True, slots=True)
class LastLevel:
    """Where sampling ends, as a share of the last evaluation's sigma; 0 is the picture without noise."""

    difference: float = 0.02

    def read(self, knots: Knots) -> Floats:
        return np.array([knots.sigmas[-1] / knots.sigmas[-2]])

    def write(self, knots: Knots, values: Floats) -> Knots | None:
        share = float(values[0])
        if not 0.0 <= share < 0.9:
            return None
        return replace(knots, sigmas=(*knots.sigmas[:-1], share * knots.sigmas[-2]))


def moved_rows(problem: Problem, knots: Knots, moved: Knots) -> Knots:
    """`moved` with the rows of `knots`, as far from the sampler's own at its levels as they were at theirs."""
    (_, before), (_, after) = own_rows(problem, knots.plain), own_rows(problem, moved.plain)
    rows = []
    for row, was, now in zip(knots.rows or (), before, after, strict=True):
        pairs = itertools.zip_longest(row.b, was.b, now.b, fillvalue=0.0)
        rows.append(FittedRow(row.a + now.a - was.a, tuple(b + n - w for b, w, n in pairs)))
    return replace(moved, rows=tuple(rows))


Distance = Callable[[Knots], float]
Remember = Callable[[str, Callable[[], Knots | None]], Knots | None]
"""Gives what is known under a key, or finds it and keeps it (`journal.py`)."""


def forget(key: str, find: Callable[[], Knots | None]) -> Knots | None:
    """Remembers nothing."""
    return find()


def descend(
    problem: Problem,
    knots: Knots,
    *,
    along: Sequence[Freedom],
    on: Pairs,
    judge: Distance,
    rounds: int,
    remember: Remember = forget,
) -> tuple[Knots, float]:
    """The best candidate that the judge saw on the way down, and its distance there.

    on: pairs with a teacher's results that are descended on; judge: a candidate's distance on others (`judge.py`). A
    round that `remember` gives as `None` ends the descent.
    """
    return _go_down(knots, lambda k: _round(problem, k, along, on), judge, rounds, remember)


def descend_rows(
    problem: Problem, knots: Knots, *, on: Pairs, judge: Distance, rounds: int, remember: Remember = forget
) -> tuple[Knots, float]:
    """The same over the coefficients of fitted rows (their end-point form: S4S, arXiv 2502.17423, without gradients).

    A coefficient of row i moves only what comes after it, so its derivative costs n - 1 - i evaluations a pair, and the
    last row's none.
    """
    return _go_down(knots, lambda k: _rows_round(problem, k, on), judge, rounds, remember)


def _go_down(
    knots: Knots,
    step: Callable[[Knots], Knots | None],
    judge: Distance,
    rounds: int,
    remember: Remember,
) -> tuple[Knots, float]:
    best, least = knots, judge(knots)
    for i in range(rounds):
        here = knots
        moved = remember(str(i), lambda here=here: step(here))  # type: ignore[misc]
        if moved is None:
            break
        knots = moved
        error = judge(knots)
        gained = error < least * (1.0 - LEAST_GAIN)
        if error < least:
            best, least = knots, error
        if not gained:
            break
    return best, least


def _round(problem: Problem, knots: Knots, along: Sequence[Freedom], on: Pairs) -> Knots | None:
    """One step of Gauss and Newton, with the damping that does best; `None` where none gains."""
    counts = [len(f.read(knots)) for f in along]
    values = _read(along, knots)
    moves = np.concatenate([np.full(n, f.difference) for n, f in zip(counts, along, strict=True)])

    def at(point: Floats) -> Knots | None:
        made: Knots | None = knots
        for freedom, part in zip(along, np.split(point, np.cumsum(counts)[:-1]), strict=True):
            made = None if made is None else freedom.write(made, part)
        return made

    candidates: list[Knots] = [knots]
    signs = np.ones(len(values))
    for i in range(len(values)):
        for sign in (1.0, -1.0):
            neighbour = at(values + sign * moves[i] * np.eye(len(values))[i])
            if neighbour is not None and _read(along, neighbour)[i] != values[i]:  # it may be at its bound
                signs[i] = sign
                candidates.append(neighbour)
                break
        else:
            return None
    results = problem.run([(problem.program(c), on) for c in candidates])
    steps = _damped_steps(results[0], results[1:], signs * moves, on)
    trials = [t for t in (at(values + step) for step in steps) if t is not None]
    return _best(trials, problem.errors(trials, on), results[0], on) if trials else None


def _read(along: Sequence[Freedom], knots: Knots) -> Floats:
    return np.concatenate([f.read(knots) for f in along])


def _damped_steps(result: Float32, others: Sequence[Float32], moves: Floats, on: Pairs) -> list[Floats]:
    """Solutions of (J'J + d diag J'J) step = -J'r by damping d, with r = result - teacher and J by differences."""
    if on.finals is None:
        raise ValueError("pairs without a teacher's results")
    apart = square_distances(result, on)
    weights = (apart + 0.01 * apart.mean()) ** -0.25  # each pair counts by its distance, not by its square
    by_pair = weights.reshape(-1, *(1,) * (result.ndim - 1))
    rest = np.ravel((result - on.finals) * by_pair)
    slopes = np.stack([np.ravel((o - result) * by_pair) / move for o, move in zip(others, moves, strict=True)])
    gram, pull = slopes @ slopes.T, slopes @ rest
    scale = np.diag(np.maximum(np.diag(gram), 1e-6 * np.trace(gram) + 1e-30))
    return [-np.linalg.solve(gram + damping * scale, pull) for damping in DAMPINGS]


def _best(trials: Sequence[Knots], errors: Floats, result: Float32, on: Pairs) -> Knots | None:
    means = [mean_distance(e) for e in errors]
    least = int(np.argmin(means))
    return trials[least] if means[least] < mean_distance(square_distances(result, on)) else None


def _rows_round(problem: Problem, knots: Knots, on: Pairs) -> Knots | None:
    if knots.rows is None or knots.kept is None:
        return None
    rows, levels = list(knots.rows), Levels(problem, knots, knots.kept)
    states: list[npt.NDArray[Any]] = []
    kept: list[list[npt.NDArray[Any]]] = []
    (result,) = run_together(problem.network, [(_remembered(levels, rows, on, states, kept), on.index)])
    walks, moves, places = [], [], []
    for i, row in enumerate(rows):
        history = kept[i][: len(row.b)]
        for k, (factor, quantity) in enumerate(zip((row.a, *row.b), (states[i], *history), strict=True)):
            move = 0.01 * max(abs(factor), 0.05)
            after = states[i + 1] + move * quantity
            walks.append((walk_rows(levels, rows, after, kept[i], i + 1), on.index))
            moves.append(move)
            places.append((i, k))
    finished = [(j, w) for j, w in enumerate(walks) if places[j][0] == len(rows) - 1]
    others: list[Any] = [None] * len(walks)
    for j, (walk, _) in finished:
        others[j] = _returned(walk)
    running = [j for j in range(len(walks)) if others[j] is None]
    for j, end in zip(
        running, run_together(problem.network, [walks[j] for j in running]) if running else (), strict=True
    ):
        others[j] = end
    trials = []
    for step in _damped_steps(result, others, np.array(moves), on):
        numbers = [[row.a, *row.b] for row in rows]
        for (i, k), change in zip(places, step, strict=True):
            numbers[i][k] += float(change)
        trials.append(replace(knots, rows=tuple(FittedRow(a, tuple(b)) for a, *b in numbers)))
    return _best(trials, problem.errors(trials, on), result, on)


def _remembered(levels: Levels, rows: Sequence[FittedRow], on: Pairs, states: list[Any], kept: list[list[Any]]) -> Walk:
    """A walk of the rows that keeps its states, and before each step what was kept, newest first."""
    x: npt.NDArray[Any] = on.gaussians
    history: list[npt.NDArray[Any]] = []
    for i, row in enumerate(rows):
        out = yield x, float(levels.timesteps[i])
        history = [levels.kept(i, x, out), *history[:4]]
        states.append(x)
        kept.append(history)
        x = row.a * x
        for factor, quantity in zip(row.b, history, strict=False):
            x = x + factor * quantity
    states.append(x)
    return x


def _returned(walk: Walk) -> npt.NDArray[Any]:
    """What a walk returns that asks for nothing."""
    try:
        next(walk)
    except StopIteration as end:
        return np.asarray(end.value)
    raise ValueError("a walk that is not at its end")
