"""The requests of `bench/load.py`: what is asked for in which proportions, and how long each takes alone."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from fewstep.bench.load_subjects import Ask


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Proportions of steps and sizes, as (value, weight); `guided` is the share with classifier-free guidance.

    peers: who sends the requests, with the share of each.
    """

    samplers: tuple[str, ...] = ("euler", "dpmpp_2m", "euler_ancestral", "unipc")
    steps: tuple[tuple[int, float], ...] = ((1, 0.2), (2, 0.2), (4, 0.3), (8, 0.15), (15, 0.1), (30, 0.05))
    guided: float = 0.2
    sizes: tuple[tuple[tuple[int, int], float], ...] = (((64, 64), 0.8), ((96, 96), 0.2))
    peers: tuple[tuple[str, float], ...] = (("greedy", 0.85), ("one", 0.05), ("two", 0.05), ("three", 0.05))

    @property
    def guidances(self) -> tuple[float, ...]:
        return (1.0, 2.0) if self.guided else (1.0,)

    @property
    def most_steps(self) -> int:
        return max(steps for steps, _ in self.steps)

    def draw(self, rng: random.Random, number: int) -> Ask:
        """One request."""
        return Ask(
            prompt=f"a {rng.choice(['red', 'green', 'blue'])} {rng.choice(['circle', 'ring', 'star'])}",
            seed=number,
            steps=rng.choices([s for s, _ in self.steps], [w for _, w in self.steps])[0],
            sampler=rng.choice(self.samplers),
            guidance=2.0 if rng.random() < self.guided else 1.0,
            size=rng.choices([s for s, _ in self.sizes], [w for _, w in self.sizes])[0],
            peer=random.Random(number).choices([p for p, _ in self.peers], [w for _, w in self.peers])[0],
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Alone:
    """Seconds a request takes with nobody else there: a first step and further ones, measured by guidance and size."""

    def __init__(self, mix: Mix, make: Callable[[list[Ask]], None], *, repeats: int = 5, more_steps: int = 8) -> None:
        self._mix = mix
        self._cost: dict[tuple[float, tuple[int, int]], tuple[float, float]] = {}
        for guidance in mix.guidances:
            for size, _ in mix.sizes:
                few, many = (self._time(make, s, guidance, size, repeats) for s in (1, 1 + more_steps))
                self._cost[guidance, size] = few, (many - few) / more_steps

    def __call__(self, ask: Ask) -> float:
        first, each = self._cost[ask.guidance, ask.size]
        return first + (ask.steps - 1) * each

    def step_s(self, guidance: float, size: tuple[int, int]) -> float:
        """Seconds of each step after the first."""
        return self._cost[guidance, size][1]

    @staticmethod
    def _time(
        make: Callable[[list[Ask]], None], steps: int, guidance: float, size: tuple[int, int], repeats: int
    ) -> float:
        """The best, after a first time."""
        ask = Ask(prompt="a red circle", seed=0, steps=steps, sampler="euler", guidance=guidance, size=size)
        times = []
        for _ in range(1 + repeats):
            began = time.perf_counter()
            make([ask])
            times.append(time.perf_counter() - began)
        return min(times[1:])

    def mean(self) -> float:
        """Seconds of a request of the mix, on average."""
        rng = random.Random(0)
        return statistics.mean(self(self._mix.draw(rng, i)) for i in range(4000))

    def longest(self) -> float:
        return max(first + (self._mix.most_steps - 1) * each for first, each in self._cost.values())

    def to_json(self) -> dict[str, Any]:
        return {
            f"guidance {g:g}, {w}x{h}": {"first_step_ms": round(1e3 * a, 2), "further_step_ms": round(1e3 * b, 2)}
            for (g, (w, h)), (a, b) in self._cost.items()
        }
