"""Data whose best denoiser is known exactly, as networks: to see what a found schedule gains, without a checkpoint.

States are inputs as everywhere, x = (x0 + sigma noise) / sqrt(1 + sigma^2), timesteps are ln(sigma) / 4, and the
network returns x0. Two-dimensional mixtures have exact divergences too: how far samples are from the data themselves.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError
from ..runtime.arrays import Float32
from ..schedules import NoiseSchedule, Program
from .klub import Judge
from .network import Floats, Integers
from .problem import Knots, Pairs, Problem, mean_distance

SIGMA_MIN, SIGMA_MAX = 0.002, 80.0
"""The range of Karras et al. 2022 (arXiv 2206.00364), for data of a standard deviation of about a half."""
AT_ONCE = 32768
"""Samples that are made together, so that what is computed stays in a processor's caches."""


def toy_noise(low: float = SIGMA_MIN, high: float = SIGMA_MAX, count: int = 1000) -> NoiseSchedule:
    """A noise schedule whose network is fed ln(sigma) / 4 and returns x0; its range is that of sigma."""
    sigmas = np.geomspace(low, high, count)
    return NoiseSchedule(alpha_bar=1.0 / (1.0 + sigmas**2), prediction="sample", timestep_type="continuous", config={})


@dataclass(eq=False)
class Mixture:
    """A mixture of isotropic Gaussians of one width, with the exact mean of x0 given a noised state: a `Network`.

    means: float64 [K, d]. width: each one's standard deviation. shares: float64 [K], their weights, equal ones if
    `None`.
    """

    name: str
    means: Floats
    width: float
    shares: Floats | None = None
    evaluations: int = 0
    shape: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        if self.means.ndim != 2 or not len(self.means) or self.width <= 0.0:
            raise ArgumentError(
                f"means of shape {self.means.shape} with width {self.width}", expected="[K, d], and a width above 0"
            )
        self.shape = self.means.shape[1:]

    @property
    def weights(self) -> Floats:
        shares = np.ones(len(self.means)) if self.shares is None else self.shares
        return np.asarray(shares / np.sum(shares))

    def sample(self, count: int, seed: int) -> Float32:
        """Data, float32 [count, d]."""
        rng = np.random.default_rng(seed)
        picked = rng.choice(len(self.means), count, p=self.weights)
        return np.asarray(self.means[picked] + self.width * rng.standard_normal((count, *self.shape)), np.float32)

    def __call__(self, states: Float32, timesteps: Floats, pairs: Integers) -> Float32:
        self.evaluations += len(states)
        sigmas = np.exp(4.0 * np.asarray(timesteps))
        x = states * np.sqrt(1.0 + sigmas**2).astype(np.float32)[:, None]
        precision = (1.0 / (self.width**2 + sigmas**2)).astype(np.float32)[:, None]
        means = self.means.astype(np.float32)
        if len(means) == 1:
            mean = means
        else:
            squares = np.sum(means**2, axis=1, dtype=np.float32) / 2
            logits = (x @ means.T - squares) * precision + np.log(self.weights).astype(np.float32)
            logits -= logits.max(axis=1, keepdims=True)
            np.exp(logits, out=logits)
            mean = (logits @ means) / logits.sum(axis=1, keepdims=True)
        return np.asarray(mean + np.float32(self.width**2) * precision * (x - mean), np.float32)


def gaussian(c: float, dimensions: int = 2) -> Mixture:
    """N(0, c^2 I)."""
    return Mixture("gaussian", np.zeros((1, dimensions)), c)


def ring() -> Mixture:
    """Eight small Gaussians on a circle."""
    angles = 2 * np.pi * np.arange(8) / 8
    return Mixture("ring", 0.7 * np.stack([np.cos(angles), np.sin(angles)], axis=1), 0.05)


def spiral() -> Mixture:
    """A spiral of one turn and a half, of forty Gaussians that run into each other."""
    along = np.sqrt(np.linspace(0.05, 1.0, 40))
    return Mixture(
        "spiral", along[:, None] * np.stack([np.cos(3 * np.pi * along), np.sin(3 * np.pi * along)], axis=1), 0.03
    )


def checkerboard() -> Mixture:
    """The dark fields of a board of four by four, of four Gaussians each."""
    cells = [(i, j) for i in range(8) for j in range(8) if (i // 2 + j // 2) % 2 == 0]
    return Mixture("checkerboard", (np.array(cells, np.float64) - 3.5) * 0.22, 0.06)


LOW = 0.01
"""Where the bound may end for all of them: a third of the least width, a fiftieth of the data's standard deviation."""
TOYS: dict[str, Callable[[], Mixture]] = {"ring": ring, "spiral": spiral, "checkerboard": checkerboard}


def toy_problem(network: Mixture, sampler: str, *, noise: NoiseSchedule | None = None, seed: int = 0) -> Problem:
    """A sampler on it; stochastic samplers draw from a stream of this seed for each set of pairs."""

    def draws(pairs: Pairs, program: Program) -> Callable[[], Float32]:
        rng = np.random.default_rng((seed, int(pairs.index[0])))
        return lambda: rng.standard_normal(pairs.gaussians.shape, np.float32)

    return Problem(network=network, sampler=sampler, noise=noise or toy_noise(), draws=draws)


class ReversePaths:
    """Brownian paths B for pairs, over 1 / sigma^2: what dpmpp_1m_sde draws, the same for every schedule.

    Its step is x' / s'^2 = x / s^2 + (1 / s'^2 - 1 / s^2) D + B(1 / s'^2) - B(1 / s^2) in x = x0 + s noise, so that
    results of different schedules from one path can be compared one by one.
    """

    def __init__(self, shape: tuple[int, ...], seed: int) -> None:
        self._rng, self._shape = np.random.default_rng(seed), shape
        self._times: list[float] = []
        self._values: list[npt.NDArray[np.float64]] = []

    def at(self, time: float) -> npt.NDArray[np.float64]:
        place = bisect.bisect_left(self._times, time)
        if place < len(self._times) and self._times[place] == time:
            return self._values[place]
        before, low = (self._times[place - 1], self._values[place - 1]) if place else (0.0, np.zeros(self._shape))
        noise = self._rng.standard_normal(self._shape)
        if place == len(self._times):
            value = low + math.sqrt(time - before) * noise
        else:
            share = (time - before) / (self._times[place] - before)
            value = low + share * (self._values[place] - low) + math.sqrt(share * (self._times[place] - time)) * noise
        self._times.insert(place, time)
        self._values.insert(place, value)
        return value

    def draws(self, pairs: Pairs, program: Program) -> Callable[[], Float32]:
        """For a `Problem`; the last draw, of a step to 0, is not used."""
        times = [1.0 / float(s) ** 2 if s > 0.0 else math.inf for s in program.sigmas]

        def each() -> Iterator[Float32]:
            for here, there in itertools.pairwise(times):
                if math.isinf(there):
                    yield np.zeros(self._shape, np.float32)
                else:
                    unit = (self.at(there) - self.at(here)) / math.sqrt(there - here)
                    yield np.asarray(unit, np.float32)

        drawn = each()
        return lambda: next(drawn)


def toy_judge(network: Mixture, sampler: str, *, count: int = 256, steps: int = 320, seed: int = 0) -> Judge:
    """The error of a schedule to the same sampler in many steps, from the same noise; for samplers of one stage."""
    pairs = toy_pairs(network, count, seed)
    problem = toy_problem(network, sampler)
    if sampler.endswith("sde"):
        problem = replace(problem, draws=ReversePaths(pairs.gaussians.shape, seed).draws)
    teacher = problem.program(
        Knots(name="teacher", sigmas=(*map(float, np.geomspace(SIGMA_MAX, SIGMA_MIN, steps)), 0.0))
    )
    taught = replace(pairs, finals=problem.run([(teacher, pairs)])[0])
    return lambda knots: mean_distance(problem.errors([knots], taught)[0])


def toy_pairs(network: Mixture, count: int, seed: int, first: int = 0) -> Pairs:
    """Noise to start from, numbered from `first` on."""
    rng = np.random.default_rng((seed, first))
    gaussians = rng.standard_normal((count, *network.shape), np.float32)
    return Pairs(index=np.arange(first, first + count), gaussians=gaussians)


def make_samples(problem: Problem, network: Mixture, knots: Knots, count: int, seed: int) -> Float32:
    """What a schedule makes of noise, float32 [count, d]: the same noise for every schedule."""
    program = problem.program(knots)
    starts = range(0, count, AT_ONCE)
    sets = [toy_pairs(network, min(AT_ONCE, count - first), seed, first) for first in starts]
    return np.concatenate([problem.run([(program, pairs)])[0] for pairs in sets])


@dataclass(frozen=True, kw_only=True, eq=False)
class Divergences:
    """How far samples in two dimensions are from a mixture, by cells whose probabilities under it are exact.

    cells: a side of the grid, for KL; those of a probability below `least`, and all around, are one. fine: a side of
    the grid for MMD. bandwidth: of its Gaussian kernel.
    """

    mixture: Mixture
    cells: int = 64
    least: float = 1e-4
    fine: int = 384
    bandwidth: float = 0.1

    @cached_property
    def reach(self) -> float:
        """Half of the grid's side."""
        return float(np.abs(self.mixture.means).max() + 6.0 * self.mixture.width)

    def probabilities(self, cells: int) -> Floats:
        """Of each cell, exact: float64 [cells, cells]; what lies around belongs to the outermost."""
        edges = np.linspace(-self.reach, self.reach, cells + 1)
        edges[0], edges[-1] = -np.inf, np.inf
        z = (edges - self.mixture.means[:, :, None]) / (math.sqrt(2.0) * self.mixture.width)
        masses = np.diff(0.5 * np.vectorize(math.erf, otypes=[float])(z), axis=2)
        return np.asarray(np.einsum("k,ki,kj->ij", self.mixture.weights, masses[:, 0], masses[:, 1]))

    def counts(self, samples: Float32, cells: int) -> Floats:
        """Samples by cell."""
        places = np.floor((samples + self.reach) * (cells / (2.0 * self.reach)))
        i, j = np.clip(np.nan_to_num(places, nan=0.0), 0, cells - 1).astype(np.int64).T
        return np.bincount(i * cells + j, minlength=cells**2).reshape(cells, cells).astype(np.float64)

    @cached_property
    def _coarse(self) -> tuple[Floats, npt.NDArray[np.bool_]]:
        p = self.probabilities(self.cells)
        return p, p >= self.least

    @cached_property
    def _kernel(self) -> tuple[Floats, Floats]:
        centres = (np.arange(self.fine) + 0.5) * (2.0 * self.reach / self.fine)
        apart = centres[:, None] - centres[None, :]
        return self.probabilities(self.fine), np.exp(-(apart**2) / (2.0 * self.bandwidth**2))

    def kl(self, samples: Float32) -> float:
        """KL(data || samples) over the cells, in nats.

        Half a sample is added to each cell, which takes the bias away that the logarithm of a count has, to first order
        in 1 / count, and gives empty cells a value, which depends on the number of samples.
        """
        p, single = self._coarse
        n = self.counts(samples, self.cells)
        cells, rest = p[single], max(1.0 - float(p[single].sum()), 1e-300)
        data = np.append(cells, rest)
        made = np.append(n[single], n.sum() - n[single].sum()) + 0.5
        return float(np.sum(data * np.log(data * n.sum() / made)))

    def mmd2(self, samples: Float32) -> float:
        """The squared maximum mean discrepancy of data and samples, unbiased, both by the cells of the fine grid."""
        p, kernel = self._kernel
        count = len(samples)
        q = self.counts(samples, self.fine) / count

        def product(a: Floats, b: Floats) -> float:
            return float(np.sum((kernel @ a @ kernel) * b))

        return product(p, p) - 2.0 * product(p, q) + (count * product(q, q) - 1.0) / (count - 1.0)
