"""Align Your Steps as a method (Sabour, Fidler, Kreis 2024, arXiv 2404.14507): levels that make a bound least.

In x_t = x0 + t noise, with D(x, t) the network's estimate of x0, a sampler that takes D as it was at a step's start
(Stochastic DDIM, here dpmpp_1m_sde) solves an SDE exactly, and Girsanov's theorem bounds how far its results are from
those of the exact one, in KL divergence and up to a constant, by

    KLUB(t_0 > ... > t_m) = sum_i  int from t_{i+1} to t_i of  t^-3  E || D(x_t, t) - D(x_{t_i}, t_i) ||^2  dt,

with x_t from data and x_{t_i} noised further from it. A second-order sampler takes the line through its last two D in
lambda = -ln t instead, and so does the bound at order 2. What is found for a stochastic sampler serves its
deterministic twin. Where D is exact, its changes from level to level are uncorrelated, because D(x_{t_i}) is the mean
of D(x_t) given x_{t_i}; so the line only adds to the bound there, and order 2 differs from order 1 in that it shuns a
step much longer than the one before.

The bound is on whole paths, not on results: below the data's finest structure it still asks for equal shares of levels
in ln t, which results no longer need. So its least is not where results are best, and the method stops early, by a
judge (`find_klub`), and ends at a level at which noise is hardly seen. On exact toys the bound alone gains in KL
for the stochastic sampler that it is of; for Euler and DPM++ 2M, and in coarser measures, it often loses to usual
levels, and with the judge it does not (bench/results/schedule-toys.json).

*The noise.* A data point's x_t is x0 + W(t^2) with one Brownian path W, which makes all levels nested as the bound has
them. A path is drawn where it is asked for, by Brownian bridges, and D is kept by level; so an evaluation serves all
candidates, and all have the same noise. The integral is a mean over levels that are drawn once for each data point,
stratified, from what the integrand would be for Gaussian data at their best levels, 1 / (t (t^2 + c^2)), mixed with
1 / t so that weights are bounded.

*The end.* Schedules end at sigma 0, where the bound has no value: its last integral grows without limit as its end
goes to 0, because a step to 0 adds no noise. So the bound ends above 0, at one of two places:

- at the last positive sigma, which then stays: a schedule of n evaluations has n - 1 intervals, n - 2 free levels, and
  a last step from sigma_min to 0, which is not judged and with so little noise changes nothing that is seen;
- at `low`, one level more than those that are evaluated: n intervals and n - 1 free levels, the last interval being
  judged as if it ended at `low`, and run to 0. This is how published tables are used, whose 11 numbers
  make 10 evaluations.

At few steps an evaluation at sigma_min is a waste, and the second is better.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from ..errors import ArgumentError
from ..runtime.arrays import Float32
from ..schedules.found import interpolate_levels
from .network import Floats, Integers
from .problem import Knots, Problem

Judge = Callable[[Knots], float]

FIRST, SECOND = 10, 20
"""Evaluations that are searched first, and those that longer schedules begin at."""
SIDE = 5
"""Candidates for a level on either side of it, towards each neighbour; with the level itself they are eleven."""
REACH, LEAST_REACH, NARROWING = 0.4, 0.1, 0.8
"""How far towards a neighbour candidates go at first and at least, and what is left of it after a sweep in vain.

These and `PATIENCE` were chosen among six settings by how the toys fared (`toys.py`).
"""
STRIDES, BENDS = (1.0, 4.0), (0.85, 0.95, 1.05, 1.18)
"""How many times as far as a sweep went is tried after it, and powers of the index, 1 at the last level."""
MOST_SWEEPS = 40
PATIENCE = 4
"""Sweeps without gain on what judges, after which a search ends."""
LEAST_GAIN = 1e-3
UNIFORM = 0.3
"""Share of levels drawn uniformly in ln t."""
GRID = 4096
"""Cells of the density that levels are drawn from, equal in ln t."""


def gaussian_klub(levels: Sequence[float] | Floats, c: float) -> float:
    """The bound for data N(0, c^2) in closed form, for each dimension.

    levels: float64 [m + 1], falling and positive. There E || D(x_t) - D(x_{t_i}) ||^2 is
    c^4 (1 / (c^2 + t^2) - 1 / (c^2 + t_i^2)).
    """
    u = _falling(levels) ** 2
    high, low = u[:-1], u[1:]

    def integral(v: Floats) -> Floats:
        return np.asarray(np.log1p(c**2 / v) - c**2 / v + c**4 / ((c**2 + high) * v))

    return float(np.sum(integral(low) * -1.0 + integral(high)) / 2.0)


def gaussian_optimum(high: float, low: float, c: float, steps: int) -> Floats:
    """The levels that make it least, float64 [steps], both ends among them: geometric in sin(theta), t = c tan(theta).

    That is in equal steps of ln(1 + c^2 / t^2) = -2 ln(sin(theta)).
    """
    depths = np.linspace(np.log1p((c / high) ** 2), np.log1p((c / low) ** 2), steps)
    levels = c / np.sqrt(np.expm1(depths))
    levels[-1], levels[0] = low, high  # a single one is the first
    return np.asarray(levels)


def _falling(levels: Sequence[float] | Floats) -> Floats:
    checked = np.asarray(levels, np.float64)
    if checked.ndim != 1 or len(checked) < 2 or checked[-1] <= 0.0 or np.any(np.diff(checked) >= 0.0):
        raise ArgumentError(f"levels {list(map(float, checked.ravel()))}", expected="two or more, positive and falling")
    return checked


def draw_levels(
    high: float, low: float, c: float, count: int, draws: int, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """Levels for `count` data points, stratified, and 1 / density of each: float64 [count, draws], falling in a row."""
    edges = np.linspace(np.log(low), np.log(high), GRID + 1)
    depths = np.log1p((c / np.exp(edges)) ** 2)
    shares = (1.0 - UNIFORM) * -np.diff(depths) / (depths[0] - depths[-1]) + UNIFORM / GRID
    whole = np.concatenate([[0.0], np.cumsum(shares)])
    places = (np.arange(draws)[::-1] + rng.random((count, draws))) / draws * whole[-1]
    cells = np.clip(np.searchsorted(whole, places, side="right") - 1, 0, GRID - 1)
    width = edges[1] - edges[0]
    levels = np.exp(edges[cells] + width * (places - whole[cells]) / shares[cells])
    return levels, levels * width / (shares[cells] / whole[-1])


class NoisedData:
    """Data points with a Brownian path each: their states at common levels and at levels of their own, and D there.

    data: float32 [N, *shape], x0. pairs: int64 [N], whose conditioning each has. The own levels lie between `high` and
    `low`, `draws` a point. Memory: 2 (draws + levels kept) states a point.
    """

    def __init__(
        self,
        problem: Problem,
        data: Float32,
        pairs: Integers,
        *,
        high: float,
        low: float,
        c: float,
        draws: int,
        rng: np.random.Generator,
    ) -> None:
        self._problem, self._data, self._pairs, self._rng = problem, data, pairs, rng
        self.own, weights = draw_levels(high, low, c, len(data), draws, rng)
        self._weights = weights / (draws * self.own**3)
        rising = self.own[:, ::-1] ** 2
        steps = np.sqrt(np.diff(rising, axis=1, prepend=0.0))
        shape = (*steps.shape, *data.shape[1:])
        noise = rng.standard_normal(shape, np.float32) * self._by_state(steps)
        self._own_paths = np.ascontiguousarray(np.cumsum(noise, axis=1, dtype=np.float32)[:, ::-1])
        flat = self._own_paths.reshape(-1, *data.shape[1:])
        at = self.own.ravel()
        self._own_x0 = self._evaluate(np.repeat(data, draws, axis=0) + flat, at, np.repeat(pairs, draws)).reshape(shape)
        self._paths: dict[float, Float32] = {}
        self._x0: dict[float, Float32] = {}

    def __len__(self) -> int:
        return len(self._data)

    def _by_state(self, factors: Floats) -> Float32:
        """Factors of states, to be multiplied with them."""
        shaped = factors.reshape(*factors.shape, *(1,) * (self._data.ndim - 1))
        return np.asarray(shaped, np.float32)

    def _evaluate(self, states: Float32, sigmas: Floats, pairs: Integers) -> Float32:
        inputs = states * self._by_state(1.0 / np.sqrt(1.0 + sigmas**2))
        return self._problem.denoise(inputs.astype(np.float32, copy=False), sigmas, pairs)

    def path(self, level: float) -> Float32:
        """W at a level, [N, *shape]; drawn between those that are there where it is not there yet."""
        if level not in self._paths:
            self._paths[level] = self._bridge(level)
        return self._paths[level]

    def _bridge(self, level: float) -> Float32:
        n, at = np.arange(len(self)), level**2
        below = np.sum(self.own >= level, axis=1)  # the own level next below, the last one past the end: none
        none = np.zeros_like(self._data)[:, None]
        padded = np.concatenate([self._own_paths, none], axis=1)
        floor = np.concatenate([self.own**2, np.zeros((len(self), 1))], axis=1)[n, below]
        lower = padded[n, below]
        is_top = below == 0
        above = np.maximum(below - 1, 0)
        ceiling = np.where(is_top, np.inf, self.own[n, above] ** 2)
        upper = self._own_paths[n, above]
        for known in self._paths:
            square = known**2
            if square < at:
                nearer = square > floor
                lower[nearer], floor[nearer] = self._paths[known][nearer], square
            else:
                nearer = square < ceiling
                upper[nearer], ceiling[nearer] = self._paths[known][nearer], square
        open_above = np.isinf(ceiling)
        finite = np.where(open_above, at + 1.0, ceiling)
        share = np.where(open_above, 0.0, (at - floor) / (finite - floor))
        spread = np.sqrt(np.where(open_above, at - floor, share * (finite - at)))
        noise = self._rng.standard_normal(self._data.shape, np.float32)
        return np.asarray(lower + self._by_state(share) * (upper - lower) + self._by_state(spread) * noise)

    def know(self, levels: Sequence[float]) -> None:
        """Evaluate at those levels that have not been, in one batch."""
        new = [t for t in dict.fromkeys(levels) if t not in self._x0]
        if not new:
            return
        states = np.concatenate([self._data + self.path(t) for t in new])
        out = self._evaluate(states, np.repeat(new, len(self)), np.tile(self._pairs, len(new)))
        self._x0 |= dict(zip(new, np.split(out, len(new)), strict=True))

    def forget(self, but: Sequence[float]) -> None:
        """Drop the states and estimates of other levels; the own ones stay."""
        self._paths = {t: w for t, w in self._paths.items() if t in but}
        self._x0 = {t: d for t, d in self._x0.items() if t in but}

    def terms(self, levels: Sequence[float], i: int, order: int) -> Floats:
        """By data point, the integral from levels[i + 1] to levels[i]: float64 [N]; the levels have to be known."""
        point, place = np.nonzero((self.own <= levels[i]) & (self.own > levels[i + 1]))
        apart = self._own_x0[point, place] - self._x0[levels[i]][point]
        if order > 1 and i > 0:
            along = np.log(levels[i] / self.own[point, place]) / np.log(levels[i - 1] / levels[i])
            slope = self._x0[levels[i]] - self._x0[levels[i - 1]]
            apart = apart - self._by_state(along) * slope[point]
        squares = np.sum(apart.astype(np.float64) ** 2, axis=tuple(range(1, apart.ndim)))
        weighed = np.asarray(self._weights[point, place] * squares, np.float64)
        return np.asarray(np.bincount(point, weighed, len(self)), np.float64)

    def bound(self, levels: Sequence[float], order: int) -> Floats:
        """By data point, the whole bound: float64 [N]."""
        self.know(levels[:-1])
        return np.asarray(sum(self.terms(levels, i, order) for i in range(len(levels) - 1)))


def klub(
    problem: Problem,
    data: Float32,
    pairs: Integers,
    levels: Sequence[float] | Floats,
    *,
    order: int = 1,
    seed: int = 0,
    draws: int = 32,
) -> tuple[float, float]:
    """The bound of levels, and its standard error over data points; D is summed over dimensions.

    data: float32 [N, *shape]. pairs: int64 [N]. levels: falling, a 0 at the end is left out. order: 1 or 2.
    Costs N (draws + levels) evaluations. Raises `ArgumentError` for levels that do not fall.
    """
    falling = _falling([t for t in map(float, levels) if t != 0.0])
    rng, high, low = np.random.default_rng(seed), float(falling[0]), float(falling[-1])
    noised = NoisedData(problem, data, pairs, high=high, low=low, c=_spread(data), draws=draws, rng=rng)
    values = noised.bound(tuple(map(float, falling)), order)
    return float(np.mean(values)), float(np.std(values) / np.sqrt(len(values)))


def _spread(data: Float32) -> float:
    """The data's standard deviation about its mean, over dimensions."""
    return float(np.sqrt(np.mean(np.var(data.astype(np.float64), axis=0)))) or 1.0


def find_klub(
    problem: Problem,
    data: Float32,
    pairs: Integers,
    counts: Sequence[int],
    *,
    start: Knots,
    order: int,
    seed: int,
    draws: int = 32,
    low: float | None = None,
    judge: Judge | None = None,
    go_on: Callable[[], bool] = lambda: True,
) -> dict[int, Knots]:
    """By number of evaluations, the levels that make the bound least.

    data: float32 [N, *shape], N of 4 or more; the last quarter is not descended on and says when to stop. pairs:
    int64 [N], their conditioning. counts: evaluations, 1 or more. start: the best schedule that is known, of any
    number of evaluations; its first sigma stays. order: 1 or 2, of the sampler. low: where the bound ends, below the
    last level that is evaluated; `None`: at the start's last positive sigma (see above). judge: the error of a schedule
    to a teacher, least is best; with it the best that it saw is kept, else the best on held-out data. go_on: asked
    before each sweep.

    Ten evaluations are searched first; from these fewer, and twenty by halving every interval, and from those more.
    Each is descended from there, from `start` or from the closed form of Gaussian data: from the best of them, with a
    judge from the best two. A search ends when the bound on held-out data has not fallen for four sweeps, or what
    the judge says has not. Costs about N (draws + 10 (n - 2) sweeps) evaluations for each n and each descent. Raises
    `ArgumentError`.
    """
    bottom = min(t for t in start.sigmas if t > 0.0) if low is None else low
    begun = (*(t for t in start.sigmas if t > bottom), bottom)
    if len(data) < 4 or order not in (1, 2) or not counts or min(counts) < 1 or bottom <= 0.0 or len(begun) < 2:
        raise ArgumentError(
            f"{len(data)} data points, order {order}, counts {list(counts)}, levels {list(begun)}",
            expected="4 or more points, order 1 or 2, counts of 1 or more, falling levels above 0",
        )
    rng, held, c = np.random.default_rng(seed), len(data) // 4, _spread(data)
    parts = [
        NoisedData(problem, data[part], pairs[part], high=begun[0], low=bottom, c=c, draws=draws, rng=rng)
        for part in (slice(None, -held), slice(-held, None))
    ]
    extra = low is not None
    search = _Search(parts[0], parts[1], order=order, extra=extra, judge=judge, go_on=go_on)
    found: dict[int, tuple[float, ...]] = {}
    tried = 1 if judge is None else 2

    def search_for(count: int, *others: tuple[float, ...]) -> None:
        closed = gaussian_optimum(begun[0], bottom, c, count + extra)
        starts = [*(search.resampled(levels, count) for levels in (begun, *others)), tuple(map(float, closed))]
        found[count] = search.best_first([search.descend(s) for s in search.best_first(starts)[:tried]])[0]

    search_for(FIRST)
    if max(counts) > FIRST:
        search_for(SECOND, found[FIRST])
    for count in sorted(set(counts) - found.keys()):
        search_for(count, found[SECOND if count > FIRST else FIRST])
    return {count: search.knots(found[count]) for count in sorted(set(counts))}


def sweep_evaluations(points: int) -> int:
    """What a sweep over the levels that are searched first costs at most: each but the ends is tried elsewhere."""
    return points * 2 * SIDE * (FIRST - 2)


class _Search:
    """Descent over levels, one after another; levels are positive, both ends among them, and the ends stay."""

    def __init__(
        self,
        on: NoisedData,
        held: NoisedData,
        *,
        order: int,
        extra: bool,
        judge: Judge | None,
        go_on: Callable[[], bool],
    ) -> None:
        self._on, self._held, self._order, self._extra = on, held, order, extra
        self._judge, self._go_on = judge, go_on
        self._judged: dict[tuple[float, ...], float] = {}

    def resampled(self, levels: tuple[float, ...], count: int) -> tuple[float, ...]:
        """Levels for another number of evaluations, linear in ln t over the index; doubling halves every interval."""
        if count + self._extra == 1:
            return levels[:1]
        resampled = interpolate_levels(levels, count + self._extra - 1)
        return (*resampled[:-1], levels[-1])

    def knots(self, levels: tuple[float, ...]) -> Knots:
        kept = levels[: len(levels) - self._extra]
        return Knots(name="klub", sigmas=(*kept, 0.0))

    def best_first(self, found: Sequence[tuple[float, ...]]) -> list[tuple[float, ...]]:
        """By the judge, or without one by the bound on the data that are descended on."""
        if len(found) == 1:
            return list(found)
        if self._judge is not None:
            errors = [self._judge_of(self._judge, levels) for levels in found]
        else:
            errors = [float(np.mean(self._on.bound(levels, self._order))) for levels in found]
        return [found[i] for i in np.argsort(errors, kind="stable")]

    def descend(self, levels: tuple[float, ...]) -> tuple[float, ...]:
        """Sweeps until what judges has not gained for some."""
        if len(levels) < 3:
            return levels
        best, least, reach = levels, self._errors(levels), REACH
        waited = [0] * len(least)
        for _ in range(MOST_SWEEPS):
            if not self._go_on():
                break
            swept = self._sweep(levels, reach)
            levels = swept if self._judge is not None else self._stride(levels, swept)
            errors = self._errors(levels)
            if errors[0] > least[0]:
                reach = max(NARROWING * reach, LEAST_REACH)
            waited = [0 if e < (1.0 - LEAST_GAIN) * b else w + 1 for e, b, w in zip(errors, least, waited, strict=True)]
            if errors[-1] < least[-1]:
                best = levels
            least = [min(pair) for pair in zip(errors, least, strict=True)]
            if max(waited) >= PATIENCE:
                break
        self._on.forget(but=())
        self._held.forget(but=())
        return best

    def _errors(self, levels: tuple[float, ...]) -> list[float]:
        """The bound on data that are not descended on, and what the judge says; the last one decides."""
        errors = [float(np.mean(self._held.bound(levels, self._order)))]
        self._held.forget(but=levels)
        return errors if self._judge is None else [*errors, self._judge_of(self._judge, levels)]

    def _judge_of(self, judge: Judge, levels: tuple[float, ...]) -> float:
        """What it says, asked once for the same levels."""
        if levels not in self._judged:
            self._judged[levels] = judge(self.knots(levels))
        return self._judged[levels]

    def _sweep(self, levels: tuple[float, ...], reach: float) -> tuple[float, ...]:
        for j in range(1, len(levels) - 1):
            candidates = _candidates(levels, j, reach)
            self._on.know([*levels[:-1], *candidates])
            touched = range(j - 1, min(j + self._order, len(levels) - 1))
            trials = [(*levels[:j], t, *levels[j + 1 :]) for t in candidates]
            bounds = [sum(np.sum(self._on.terms(t, i, self._order)) for i in touched) for t in trials]
            levels = trials[int(np.argmin(bounds))]
            self._on.forget(but=levels)
        return levels

    def _stride(self, before: tuple[float, ...], after: tuple[float, ...]) -> tuple[float, ...]:
        """All levels moved together, where that is better: further the way that a sweep went, or bent to either end.

        One level after another, they would go such ways slowly. Not with a judge, which is to see the whole way.
        """
        logs, index = np.log(after), np.linspace(0.0, 1.0, len(after))
        ways = [logs + times * (logs - np.log(before)) for times in STRIDES]
        ways += [np.interp(index**power, index, logs) for power in BENDS]
        trials = [after, *((after[0], *map(float, np.exp(way[1:-1])), after[-1]) for way in ways)]
        trials = [t for t in trials if all(a > b for a, b in itertools.pairwise(t))]
        self._on.know([t for levels in trials for t in levels[:-1]])
        bounds = [float(np.sum(self._on.bound(levels, self._order))) for levels in trials]
        best = trials[int(np.argmin(bounds))]
        self._on.forget(but=best)
        return best


def _candidates(levels: tuple[float, ...], j: int, reach: float) -> list[float]:
    """The level itself, and others between it and its neighbours, equal in ln t; `reach`: 1 to go all the way."""
    shares = reach * np.arange(1, SIDE + 1) / (SIDE + 1)
    here, sides = np.log(levels[j]), np.log([levels[j - 1], levels[j + 1]])
    moved = [float(np.exp(here + share * (side - here))) for side, share in itertools.product(sides, shares)]
    return [levels[j], *moved]
