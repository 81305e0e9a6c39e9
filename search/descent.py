"""From the best that is known to what was never tried: levels, timesteps fed, the last sigma, options, rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from ..schedules.fitted import FittedRow
from ..schedules.solvers.registry import find_sampler
from .endpoint import FedTimesteps, Freedom, InnerLevels, LastLevel, descend, descend_rows
from .judge import Judge
from .judging import short
from .pace import Pace
from .problem import Knots, Problem, mean_distance
from .rows import DEPTH, RIDGES, fit_rows, own_rows
from .sets import Sets
from .teacher import Trajectories, teacher_knots

STARTS = 3
"""Starts from which levels are descended, on a few pairs; the best goes on with all of them."""
FEW = 16
LEAST_APART = 0.05
"""Between two starts, in ln(sigma): nearer ones lead to the same end."""
ALTERNATIVES: tuple[Mapping[str, Any], ...] = (
    {"solver_type": "heun"},
    {"solver_type": "bh1"},
    {"lower_order_final": False},
    {"euler_at_final": True},
    {"order": 2},
    {"order": 3},
)
"""Options of samplers that are tried at the levels found, where a sampler has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Descent:
    """The ways down for a problem's number of steps."""

    problem: Problem
    sets: Sets
    judge: Judge
    pace: Pace

    def descended(self, ranked: Sequence[Knots], n: int, deadline: float) -> tuple[Knots, float]:
        problem, sets = self.problem, self.sets
        few, judge = sets.search.first(FEW), self.judge.distance
        levels: list[Freedom] = [InnerLevels(problem=problem)] if n > 1 else []
        fed = FedTimesteps(problem=problem)
        wide: list[Freedom] = [*levels, fed]
        first: list[tuple[Knots, float]] = []
        for i, start in enumerate(_apart(ranked, STARTS)):
            remember = self.pace.remembering(f"{n}-start{i}", deadline)
            if levels:
                start, _ = descend(problem, start, along=levels, on=few, judge=judge, rounds=6, remember=remember)
            remember = self.pace.remembering(f"{n}-fed{i}", deadline)
            first.append(descend(problem, start, along=wide, on=few, judge=judge, rounds=4, remember=remember))
        knots, error = min(first, key=lambda item: item[1])
        for option in alternatives(problem, knots):
            other = judge(option)
            if other < error:
                knots, error = option, other
        widest: list[Freedom] = [*wide, LastLevel()]
        remember = self.pace.remembering(f"{n}-all", deadline)
        return descend(problem, knots, along=widest, on=sets.search, judge=judge, rounds=6, remember=remember)

    def rowed(
        self,
        trajectories: Trajectories | None,
        candidates: Sequence[tuple[str, Knots, float]],
        n: int,
        deadline: float,
    ) -> list[tuple[Knots, float]]:
        """Candidates with rows: least squares on the trajectories, then descent over their coefficients and levels."""
        problem, judge, on = self.problem, self.judge.distance, self.sets.search
        best = sorted((c for c in candidates if c[1].rows is None), key=lambda c: c[2])
        starts = _apart([k for _, k, _ in best], STARTS)
        tried: list[tuple[Knots, float]] = []
        if trajectories is not None:
            cells = [(k, r) for k in starts for r in RIDGES]
            weights = self.pace.journal.value(
                f"{n}-weights", lambda: [float(w) for w in (problem.errors([starts[0]], on)[0] + 1e-5) ** -0.25]
            )

            def fitted(cell: tuple[Knots, float]) -> Knots:
                return fit_rows(problem, [cell], trajectories, weights=np.array(weights))[0]

            rowed = [self.pace.journal.knots(f"{n}-ridge{i}", partial(fitted, cell)) for i, cell in enumerate(cells)]
            fits = [k for k in rowed if k is not None]
            tried += list(zip(fits, self.judge.distances(fits), strict=True))
        prior = _with_own_rows(problem, starts[0])
        tried.append((prior, judge(prior)))
        down = sorted(tried, key=lambda item: item[1])[:1]
        if down[0][0].sigmas != prior.sigmas or down[0][0].rows != prior.rows:
            down.append((prior, 0.0))
        moving: list[Freedom] = [*([InnerLevels(problem=problem)] if n > 1 else []), FedTimesteps(problem=problem)]
        for i, (knots, _) in enumerate(down):
            for turn in range(2):
                remember = self.pace.remembering(f"{n}-rows{i}.{turn}", deadline)
                knots, error = descend_rows(problem, knots, on=on, judge=judge, rounds=3, remember=remember)
                remember = self.pace.remembering(f"{n}-moved{i}.{turn}", deadline)
                knots, error = descend(problem, knots, along=moving, on=on, judge=judge, rounds=2, remember=remember)
            tried.append((knots, error))
        return tried

    def null_run(self, trajectories: Trajectories, steps: int) -> dict[str, Any]:
        """Rows fitted to the teacher's states of other pairs, beside those fitted to their own, on pairs to choose by.

        What is learned must be the model's and not the search's: with shuffled targets it has to lose.
        """
        sigmas = teacher_knots(self.problem, steps).sigmas
        knots = Knots(name="karras", sigmas=sigmas)
        order = np.roll(np.arange(len(trajectories.pairs)), 1)
        states = trajectories.states.copy()
        states[1:] = states[1:, order]
        shuffled = replace(trajectories, states=states, x0=trajectories.x0[:, order])
        fits = [fit_rows(self.problem, [(knots, RIDGES[0])], t)[0] for t in (trajectories, shuffled)]
        names = ("fitted", "shuffled", "own")
        errors = self.problem.errors([*fits, knots], self.sets.choose)
        return {"steps": steps, **{k: short(mean_distance(e)) for k, e in zip(names, errors, strict=True)}}


def alternatives(problem: Problem, knots: Knots) -> list[Knots]:
    """The same levels with other options of the sampler."""
    own = find_sampler(problem.sampler).options
    made = []
    for option in ALTERNATIVES:
        (name, value), *_ = option.items()
        if (
            name not in own
            or own[name] == value
            or (name == "solver_type" and str(own[name])[:2] == "bh") != (str(value)[:2] == "bh")
        ):
            continue
        made.append(replace(knots, name=f"{knots.name}, {name}", options={**knots.options, **option}))
    return made


def _with_own_rows(problem: Problem, knots: Knots) -> Knots:
    """The candidate with the sampler's own rows as fitted ones, each with room for as many evaluations as are read."""
    kept, own = own_rows(problem, knots)
    rows = []
    for i, row in enumerate(own):
        room = max(len(row.b), min(i + 1, DEPTH))
        rows.append(FittedRow(row.a, row.b + (0.0,) * (room - len(row.b))))
    return replace(knots, kept=kept, rows=tuple(rows))


def _apart(ranked: Sequence[Knots], most: int) -> list[Knots]:
    """The first candidates that differ from those before them."""
    chosen: list[Knots] = []
    for knots in ranked:
        logs = np.log(knots.sigmas[:-1])
        if all(np.max(np.abs(logs - np.log(k.sigmas[:-1]))) > LEAST_APART for k in chosen) or not chosen:
            chosen.append(knots)
        if len(chosen) == most:
            break
    return chosen
