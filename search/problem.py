"""What is searched: a sampler on a network, and how near its results come to a teacher's, in shared evaluations."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..runtime.arrays import Float32
from ..schedules import NoiseSchedule, Program
from ..schedules.fitted import FittedRow, Kept
from ..schedules.found import FoundEntry
from ..schedules.levels import Level, Preconditioning
from ..schedules.spacing import sigma_range
from .network import Floats, Integers, Network

Walk = Generator[tuple[npt.NDArray[Any], float], npt.NDArray[Any], npt.NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Knots:
    """Where a sampler's steps lie, and what else of it is searched: an `FoundEntry` in the making.

    sigmas [n + 1]; fed [n] or `None`; options of the sampler; rows over what `kept` says, or `None`: the sampler's own.
    """

    name: str
    sigmas: tuple[float, ...]
    fed: tuple[float, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    kept: Kept | None = None
    rows: tuple[FittedRow, ...] | None = None

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def plain(self) -> Knots:
        """The same levels without anything fitted."""
        return replace(self, fed=None, options={}, kept=None, rows=None)

    def entry(self, method: str, **more: Any) -> FoundEntry:
        parts = {k: getattr(self, k) for k in ("sigmas", "fed", "options", "kept", "rows")}
        return FoundEntry(steps=self.steps, method=method, **parts, **more)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pairs:
    """Prompts with seeds: rows of the network's conditioning, int64 [N], and the noise to start from, [N, *shape].

    finals: the teacher's results from that noise, [N, *shape], where they are known.
    """

    index: Integers
    gaussians: Float32
    finals: Float32 | None = None

    def __len__(self) -> int:
        return len(self.index)

    def first(self, count: int) -> Pairs:
        """At most so many of them."""
        finals = None if self.finals is None else self.finals[:count]
        return Pairs(index=self.index[:count], gaussians=self.gaussians[:count], finals=finals)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Problem:
    """A sampler on a network.

    sampler: its canonical name, with options. noise, prediction: of the network. draws: unit noises for pairs of a set
    between two levels, for samplers that draw (`noise.py`); `None` for those that do not.
    """

    network: Network
    sampler: str
    noise: NoiseSchedule
    options: Mapping[str, Any] = field(default_factory=dict)
    draws: Callable[[Pairs, Program], Callable[[], Float32]] | None = None

    @property
    def prediction(self) -> str:
        return self.noise.prediction

    @property
    def range(self) -> tuple[float, float]:
        """The least and the greatest sigma that the network was trained at."""
        return sigma_range(self.noise)

    def program(self, knots: Knots) -> Program:
        options = {**self.options, **knots.options}
        return replace(knots, options=options).entry("known").program(self.sampler, noise=self.noise)

    def timesteps(self, sigmas: Sequence[float] | Floats) -> Floats:
        """What the network is fed at these levels."""
        return np.asarray(self.noise.timestep_at(np.asarray(sigmas, np.float64)))

    def run(self, asked: Sequence[tuple[Program, Pairs]]) -> list[Float32]:
        """The results of these programs, each from its pairs' noise, [N, *shape]; all evaluations are shared."""
        return run_together(
            self.network, [(p.walk(pairs.gaussians, self._draw(pairs, p)), pairs.index) for p, pairs in asked]
        )

    def errors(self, candidates: Sequence[Knots], pairs: Pairs) -> Floats:
        """By candidate and pair, the mean square of the distance to the teacher's result: float64 [M, N]."""
        results = self.run([(self.program(knots), pairs) for knots in candidates])
        return np.stack([square_distances(result, pairs) for result in results])

    def denoise(self, states: Float32, sigmas: Floats, pairs: Integers) -> Float32:
        """The network's estimates of x0 for its inputs x = alpha x0 + s noise, [N, *shape], at sigmas [N]."""
        out = self.network(states, self.timesteps(sigmas), pairs)
        return self.x0(states, out, sigmas)

    def x0(self, states: Float32, out: Float32, sigmas: Floats) -> Float32:
        """x0 from inputs and raw outputs."""
        at = Preconditioning(prediction=self.prediction)
        readings = [at.at(Level(0.0, float(sigma))) for sigma in sigmas]
        by_row = (-1,) + (1,) * (states.ndim - 1)
        x = np.array([r.x0_x for r in readings], np.float32).reshape(by_row)
        y = np.array([r.x0_out for r in readings], np.float32).reshape(by_row)
        return x * states + y * out

    def _draw(self, pairs: Pairs, program: Program) -> Callable[[], Float32]:
        if self.draws is not None:
            return self.draws(pairs, program)
        return lambda: np.zeros_like(pairs.gaussians)


def square_distances(result: Float32, pairs: Pairs) -> Floats:
    """By pair, the mean square of the distance to the teacher's result."""
    if pairs.finals is None:
        raise ValueError("pairs without a teacher's results")
    apart = (result - pairs.finals).astype(np.float64).reshape(len(result), -1)
    return np.asarray(np.mean(apart**2, axis=1))


def mean_distance(errors: Floats) -> float:
    """The mean over pairs of the root of the mean square."""
    return float(np.mean(np.sqrt(errors)))


def run_together(network: Network, walks: Sequence[tuple[Walk, Integers]]) -> list[Float32]:
    """Drive walks to their ends in lockstep; what they ask of the network in one round is one batch."""
    results: list[Any] = [None] * len(walks)
    asked: dict[int, tuple[npt.NDArray[Any], float]] = {i: next(walk) for i, (walk, _) in enumerate(walks)}
    while asked:
        states = np.concatenate([x.astype(np.float32, copy=False) for x, _ in asked.values()])
        counts = [len(x) for x, _ in asked.values()]
        timesteps = np.repeat([t for _, t in asked.values()], counts)
        out = network(states, timesteps, np.concatenate([walks[i][1] for i in asked]))
        following = {}
        for i, part in zip(asked, np.split(out, np.cumsum(counts)[:-1]), strict=True):
            try:
                following[i] = walks[i][0].send(part)
            except StopIteration as end:
                results[i] = end.value
        asked = following
    return results
