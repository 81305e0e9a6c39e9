"""What a search stands on: pairs in three sets, as many as the budget takes, and the teacher's results for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from ..errors import ArgumentError
from ..runtime import Pipeline
from ..runtime.arrays import Float32
from ..schedules import NoiseSchedule, Program, compile_program
from ..schedules.names import resolve_sampler
from .descent import STARTS
from .judging import short
from .known import CURVE, PUBLISHED, USUAL
from .network import EngineNetwork
from .pace import Pace
from .problem import Pairs, Problem, mean_distance, square_distances
from .rows import RIDGES
from .sets import Counts, Sets, make_sets
from .settings import STUDENT_STEPS, SearchSettings
from .teacher import Trajectories, follow_teacher, teach, teacher_knots
from .trajectory import FINISH, PROBED_PAIRS, PROBES

AT_ONCE = 8
"""Images in one evaluation, or as many as the pipeline was opened for, where the engine admits them."""
CHUNK = 16
"""Pairs whose teacher's results are kept together: what a killed search does not do again."""
LEAST = Counts(search=4, choose=4, held_out=8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """A pipeline, what is asked of it, and the time for it."""

    pipeline: Pipeline
    settings: SearchSettings
    pace: Pace
    noise: NoiseSchedule
    draws: Callable[[Pairs, Program], Callable[[], Float32]] | None

    @property
    def stochastic(self) -> bool:
        """Whether the sampler draws noise."""
        return self.draws is not None

    def prepare(self) -> tuple[Problem, Sets]:
        """The problem, and the sets with the teacher's results; `ArgumentError` for a budget that cannot do."""
        self.pace.say("encoding prompts")
        sets = self._sets(self.settings.counts)
        counts = self._planned(sets)
        if counts != self.settings.counts:
            sets = self._sets(counts)
        problem = self.problem(sets)
        return problem, self._taught(problem, sets)

    def _sets(self, counts: Counts) -> Sets:
        s = self.settings
        return make_sets(
            self.pipeline, s.prompts, counts, seed=s.seed, guidance=s.guidance, size=s.size, negative=s.negative
        )

    def problem(self, sets: Sets) -> Problem:
        shape = sets.search.gaussians.shape[1:]
        network = EngineNetwork(
            self.pipeline,
            sets.conditionings,
            self.settings.guidance,
            (int(shape[0]), int(shape[1]), int(shape[2])),
            max(AT_ONCE, self.pipeline.batch),
        )
        return Problem(
            network=network,
            sampler=self.settings.sampler,
            noise=self.noise,
            options=self.settings.options,
            draws=self.draws,
        )

    def _planned(self, sets: Sets) -> Counts:
        """As many pairs as the budget takes: all that are asked for, or halved until what must be done fits in half."""
        problem, asked = self.problem(sets), self.settings.counts

        def measured() -> list[float]:
            each, counts = _seconds_each(problem, sets.search), asked
            while self._must(counts) * each > 0.5 * self.pace.budget and counts != LEAST:
                counts = Counts(
                    search=max(LEAST.search, counts.search // 2),
                    choose=max(LEAST.choose, counts.choose // 2),
                    held_out=max(LEAST.held_out, counts.held_out // 2),
                )
            if self._must(counts) * each > self.pace.budget:
                raise ArgumentError(
                    f"a budget of {self.pace.budget:.0f} s, where an evaluation takes {each:.2g} s",
                    expected=f"at least {1.2 * self._must(counts) * each:.0f} s",
                    remedy="Give more (--budget), a smaller size, or fewer numbers of steps.",
                )
            return [counts.search, counts.choose, counts.held_out, each]

        search, choose, held_out, _ = self.pace.journal.value("plan", measured)
        return Counts(search=int(search), choose=int(choose), held_out=int(held_out))

    def seconds(self, evaluations: int) -> float:
        """What so many evaluations take at the pace at which the search was planned."""
        *_, each = self.pace.journal.value("plan", list)
        return float(each) * evaluations

    def reserve(self, problem: Problem, sets: Sets, place: int) -> float:
        """Seconds for what comes after the descent for `steps[place]`, verdicts and tables, and a tenth more.

        At the pace of now: the machine may have other work than when the search was planned.
        """
        search, choose, held_out, planned = self.pace.journal.value("plan", list)
        counts = Counts(search=int(search), choose=int(choose), held_out=int(held_out))
        now = self.pace.journal.value(f"pace{place}", lambda: _seconds_each(problem, sets.search))
        each = max(float(planned), float(now))
        return 1.1 * each * (self._verdicts(counts, place) + self._rows(counts, place) + self._last(counts))

    def _rows(self, counts: Counts, place: int) -> int:
        """Of rows that are fitted on pairs to search on and judged on those to choose by, whatever the time is."""
        fits = STARTS * len(RIDGES) + 1
        return fits * sum(self.settings.steps[place:]) * (counts.search + counts.choose) if self._walks else 0

    def _must(self, counts: Counts) -> int:
        """Evaluations that are made in any case: the teacher's, and the verdict's."""
        probed = 2 * PROBES * FINISH * min(PROBED_PAIRS, counts.search) if self._walks else 0
        return self._teacher_steps * counts.total + probed + self._verdicts(counts, 0) + self._last(counts)

    @property
    def _walks(self) -> bool:
        """Whether anything is learned from the teacher's trajectories."""
        s = self.settings
        return not (s.student or self.stochastic or s.method in ("klub", "endpoint"))

    @property
    def _teacher_steps(self) -> int:
        return STUDENT_STEPS if self.settings.student else self.settings.teacher_steps

    def _verdicts(self, counts: Counts, place: int) -> int:
        """Of known schedules on pairs to choose by, and of all on held-out ones, from `steps[place]` on."""
        schedules = len(PUBLISHED) + len(USUAL) + 1
        return schedules * sum(self.settings.steps[place:]) * (counts.choose + counts.held_out)

    def _last(self, counts: Counts) -> int:
        """The teacher's in twice the steps, and the tables' curves."""
        s = self.settings
        tables = 0 if s.student else len(PUBLISHED) * counts.curve * sum({*s.steps, *CURVE})
        return 2 * self._teacher_steps * counts.floor + tables

    def teach(self, problem: Problem, pairs: Pairs, times: int = 1) -> Pairs:
        """The pairs with results of the reference: a second-order solver's in many steps, or the sampler's own."""
        s = self.settings
        if s.student:
            own = self.pipeline.bundle.defaults
            schedule = own.schedule if own.sampler and resolve_sampler(own.sampler).name == s.sampler else None
            program = compile_program(
                s.sampler, schedule=schedule, steps=times * STUDENT_STEPS, noise=self.noise, **s.options
            )
        elif self.stochastic:
            sigmas = teacher_knots(problem, times * s.teacher_steps).sigmas
            program = compile_program(s.sampler, sigmas=sigmas, noise=self.noise, **s.options)
        else:
            return teach(problem, pairs, times * s.teacher_steps)
        return replace(pairs, finals=problem.run([(program, pairs)])[0])

    def _taught(self, problem: Problem, sets: Sets) -> Sets:
        """The sets with the teacher's results; where it is followed, those to search on end its trajectories."""
        parts = {}
        for name in ("search", "choose", "held_out"):
            pairs = getattr(sets, name)
            self.pace.say(f"the teacher's results: {name.replace('_', ' ')}")
            if name == "search" and self._walks:
                ends = [part["states"][-1] for part in self._walked(problem, pairs)]
            else:
                ends = [
                    self.pace.journal.arrays(f"{name}-{first}", partial(self._finals, problem, part))["finals"]
                    for first, part in _chunks(pairs)
                ]
            parts[name] = replace(pairs, finals=np.concatenate(ends))
        return replace(sets, **parts)

    def _finals(self, problem: Problem, pairs: Pairs) -> Mapping[str, Float32]:
        finals = self.teach(problem, pairs).finals
        return {"finals": np.asarray(finals, np.float32)}

    def _walked(self, problem: Problem, pairs: Pairs) -> list[Mapping[str, Float32]]:
        """States and estimates on the teacher's way, by chunks of pairs."""

        def follow(part: Pairs) -> Mapping[str, Float32]:
            walked = follow_teacher(problem, part, self.settings.teacher_steps)
            return {"states": walked.states, "x0": walked.x0}

        return [
            self.pace.journal.arrays(f"trajectories-{first}", partial(follow, part)) for first, part in _chunks(pairs)
        ]

    def trajectories(self, problem: Problem, sets: Sets) -> Trajectories | None:
        """What the teacher went through for the pairs to search on, or `None` where nothing is learned from it."""
        if not self._walks:
            return None
        parts = self._walked(problem, sets.search)
        sigmas = np.array(teacher_knots(problem, self.settings.teacher_steps).sigmas)
        states, x0 = (np.concatenate([part[k] for part in parts], axis=1) for k in ("states", "x0"))
        return Trajectories(pairs=sets.search, sigmas=sigmas, states=states, x0=x0)

    def teacher_words(self, problem: Problem, sets: Sets) -> dict[str, Any]:
        """What the teacher is, and how far it is from itself in twice the steps: below that nothing can be told."""
        few = sets.held_out.first(sets.counts.floor)
        twice = self.pace.journal.arrays(
            "floor", lambda: {"finals": np.asarray(self.teach(problem, few, times=2).finals, np.float32)}
        )["finals"]
        s = self.settings
        own = s.student or self.stochastic
        return {
            "sampler": s.sampler if own else "dpmpp_2m",
            "steps": STUDENT_STEPS if s.student else s.teacher_steps,
            "noise_floor": short(mean_distance(square_distances(twice, few))),
        }


def _seconds_each(problem: Problem, pairs: Pairs) -> float:
    """What an evaluation takes for one pair, in a batch: the second time that it is asked."""
    few = pairs.first(8)
    for _ in range(2):
        began = time.perf_counter()
        problem.denoise(few.gaussians, np.ones(len(few)), few.index)
        each = (time.perf_counter() - began) / len(few)
    return each


def _chunks(pairs: Pairs) -> list[tuple[int, Pairs]]:
    """The pairs without results, `CHUNK` at a time, each with the place of its first."""
    places = range(0, len(pairs), CHUNK)
    return [(i, Pairs(index=pairs.index[i : i + CHUNK], gaussians=pairs.gaussians[i : i + CHUNK])) for i in places]
