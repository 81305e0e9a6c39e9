"""The conductor: a teacher, candidates by every method, descent, rows, and a verdict on pairs that nobody has seen."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime import Pipeline
from ..runtime.arguments import check_real
from ..runtime.arrays import Float32
from ..schedules import NoiseSchedule
from ..schedules.found import FoundEntry, FoundSchedules, noise_digest
from ..schedules.solvers.registry import find_sampler
from ..version import __version__
from .descent import Descent
from .ground import Ground
from .journal import Journal
from .judge import Judge
from .judging import short
from .klub import find_klub, sweep_evaluations
from .known import PUBLISHED, known_schedules
from .noise import draws_of
from .pace import Pace, Progress
from .problem import Knots, Problem
from .sets import Sets, prompts_digest
from .settings import read_settings
from .teacher import Trajectories
from .trajectory import find_on_trajectories
from .verdict import HeldOutVerdict

LEAST_DATA, MOST_DATA = 16, 24
"""Noisings that the bound is estimated from, of fewer pairs several each; and teacher's results among them."""
KLUB_SWEEPS = 6
"""Sweeps over the levels for each number of steps; the judge ends most of them sooner."""
KLUB_SHARE = 0.3
"""Of what is left of the budget, at most."""


def search_schedules(
    pipeline: Pipeline,
    *,
    sampler: str | None = None,
    steps: Sequence[int] = (5, 8, 10, 20),
    prompts: Sequence[str] | None = None,
    guidance: float | None = None,
    size: tuple[int, int] | None = None,
    negative: str | None = None,
    method: str = "auto",
    budget: float = 1200.0,
    pairs: int = 32,
    held_out: int = 256,
    teacher_steps: int = 100,
    seed: int = 0,
    student: bool | None = None,
    pictures: Sequence[Float32] = (),
    options: Mapping[str, Any] | None = None,
    work: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> FoundSchedules:
    """Find levels, timesteps and rows of a sampler for a loaded model, for each number of steps.

    sampler: any name, the bundle's default if `None`; options: of it. guidance, size, negative: what it is found at,
    the bundle's own if `None`. prompts: at least three different ones, general captions if `None`; they are shared
    among three sets that have no prompt and no seed in common. method: "klub" (Align Your Steps' bound), "trajectory"
    (dynamic programming), "endpoint" (descent on the result's distance), "rows" (fitted coefficients), or "auto", all
    of them, the one that does best on pairs to choose by. budget: seconds; pairs of each set are halved until what
    must be done fits, and descent stops in time. pairs: to search on, and as many to choose by; held_out: to be judged
    by. teacher_steps: of the reference, at least 100. student: whether the model was distilled to few steps and is
    judged by its own eight; `None`: where its bundle says so. pictures: latents float32 [C, h, w] for the bound's
    data, beside the teacher's. work: a folder in which a killed search is continued (`Journal`). progress: is told what
    is done and the share of the budget that is spent.

    What is returned beats every known schedule on held-out pairs, its interval clear of 1, or is the best known one and
    says so. The same arguments give the same schedules, unless the budget cut the descent short (`made["cut"]`).

    Raises `ArgumentError`, `UnknownNameError`, `UnsupportedError`; `MismatchError` for a folder of another search.
    """
    settings = read_settings(
        pipeline,
        sampler=sampler,
        steps=steps,
        prompts=prompts,
        guidance=guidance,
        size=size,
        negative=negative,
        method=method,
        pairs=pairs,
        held_out=held_out,
        teacher_steps=teacher_steps,
        seed=seed,
        student=student,
        options=options,
        pictures=pictures,
    )
    noise = NoiseSchedule.from_diffusers(pipeline.bundle.noise_config)
    stated = {**settings.to_json(), "model": pipeline.bundle.unet_digest, "version": __version__}
    journal = Journal(None if work is None else Path(work), stated)
    pace = Pace(journal=journal, budget=check_real("budget", budget, 1.0, 1e7), progress=progress)
    draws = draws_of(settings.sampler, float(noise.sigmas[0]), float(noise.sigmas[-1]), settings.seed)
    ground = Ground(pipeline=pipeline, settings=settings, pace=pace, noise=noise, draws=draws)
    problem, sets = ground.prepare()
    return _Conductor(ground, problem, sets, pictures).run()


class _Conductor:
    """One search on prepared ground, to the file's contents."""

    def __init__(self, ground: Ground, problem: Problem, sets: Sets, pictures: Sequence[Float32]) -> None:
        self.ground, self.problem, self.sets, self.pictures = ground, problem, sets, pictures
        self.settings, self.pace, self.journal = ground.settings, ground.pace, ground.pace.journal
        self.judge = Judge(problem=problem, pairs=sets.choose, journal=self.journal)
        self.descent = Descent(problem=problem, sets=sets, judge=self.judge, pace=ground.pace)
        self.verdict = HeldOutVerdict(
            pipeline=ground.pipeline, problem=problem, sets=sets, pace=ground.pace, student=self.settings.student
        )

    def run(self) -> FoundSchedules:
        settings, bundle, sets = self.settings, self.ground.pipeline.bundle, self.sets
        counts = {k: len(getattr(sets, k)) for k in ("search", "choose", "held_out")}
        trajectories = self.ground.trajectories(self.problem, sets)
        entries, reports = [], {}
        by_klub = self._klub()
        by_paths = self._paths(trajectories)
        for place, n in enumerate(settings.steps):
            starts = [*(k[n] for k in (by_paths, by_klub) if n in k)]
            entry, report = self._count(trajectories, n, starts, place)
            entries.append(entry)
            reports[str(n)] = report
        null: dict[str, Any] = {}
        if trajectories is not None and settings.method in ("auto", "rows"):
            middle = settings.steps[len(settings.steps) // 2]
            null = {"null": self.journal.value("null", lambda: self.descent.null_run(trajectories, middle))}
        equal = self.verdict.equal_error(entries)
        made = {
            "bundle": bundle.name,
            "family": bundle.family,
            "version": __version__,
            **settings.to_json(),
            "prompts": {"count": len(settings.prompts), "sha256": prompts_digest(settings.prompts)},
            "pairs": counts,
            "seeds": {
                name: [settings.seed + int(p.index[0]), settings.seed + int(p.index[-1])]
                for name, p in (("search", sets.search), ("choose", sets.choose), ("held_out", sets.held_out))
            },
            "teacher": self.ground.teacher_words(self.problem, sets),
            "cut": bool(self.journal.value("cut", lambda: False)),
            "found": reports,
            "equal_error": equal,
            **null,
        }
        found = FoundSchedules(
            sampler=settings.sampler,
            model=bundle.unet_digest,
            noise_digest=noise_digest(self.ground.noise),
            guidance=settings.guidance,
            size=settings.size,
            entries=tuple(entries),
            made=made,
        )
        self.pace.say("done")
        return found

    def _klub(self) -> Mapping[int, Knots]:
        s = self.settings
        if s.student or s.method not in ("auto", "klub"):
            return {}
        self.pace.say("the bound of Align Your Steps")
        pairs = self.sets.search.first(MOST_DATA)
        finals = np.asarray(pairs.finals, np.float32)
        data = np.concatenate([finals, *(p[None] for p in self.pictures)])
        index = np.concatenate([pairs.index, np.resize(pairs.index, len(self.pictures)).astype(np.int64)])
        times = -(-LEAST_DATA // len(data))  # each time with other noise
        data, index = np.concatenate([data] * times), np.concatenate([index] * times)
        order = min(2, find_sampler(s.sampler).order)
        deadline = self.pace.deadline(KLUB_SHARE)
        sweeps, most = itertools.count(), KLUB_SWEEPS * (len(s.steps) + 1)
        sweep = self.ground.seconds(sweep_evaluations(len(data)))

        def search() -> Mapping[int, Knots]:
            usual = [k for k in known_schedules(self.problem, 10) if k.name in PUBLISHED]
            return find_klub(
                self.problem,
                data,
                index,
                s.steps,
                start=self.judge.best(usual),
                order=order,
                seed=s.seed,
                low=self.problem.range[0],
                judge=self.judge.distance,
                go_on=lambda: next(sweeps) < most and self.pace.in_time(deadline - sweep),
            )

        levels = self.journal.value("klub", lambda: {str(n): list(knots.sigmas) for n, knots in search().items()})
        return {int(n): Knots(name="klub", sigmas=tuple(sigmas)) for n, sigmas in levels.items()}

    def _paths(self, trajectories: Trajectories | None) -> Mapping[int, Knots]:
        if trajectories is None:
            return {}
        self.pace.say("dynamic programming on the trajectories")
        levels = self.journal.value(
            "paths",
            lambda: {
                str(n): list(knots.sigmas)
                for n, knots in find_on_trajectories(self.problem, trajectories, self.settings.steps).items()
            },
        )
        return {int(n): Knots(name="trajectory", sigmas=tuple(sigmas)) for n, sigmas in levels.items()}

    # one number of steps

    def _count(
        self,
        trajectories: Trajectories | None,
        n: int,
        starts: Sequence[Knots],
        place: int,
    ) -> tuple[FoundEntry, dict[str, Any]]:
        """The entry of n steps: candidates, the best of them on the pairs to choose by, and its verdict."""
        self.pace.say(f"{n} steps: known schedules")
        known = known_schedules(self.problem, n)
        tried = [*known, *starts]
        errors = {(k.name, k.sigmas): e for k, e in zip(tried, self.judge.distances(tried), strict=True)}
        ranked = sorted(tried, key=lambda k: errors[k.name, k.sigmas])
        deadline = self.pace.deadline_of(
            place, self.settings.steps, self.ground.reserve(self.problem, self.sets, place)
        )
        candidates: list[tuple[str, Knots, float]] = [
            (k.name if k.name in ("klub", "trajectory") else "known", k, errors[k.name, k.sigmas]) for k in ranked
        ]
        method = self.settings.method
        if method in ("auto", "endpoint"):
            self.pace.say(f"{n} steps: descent")
            candidates.append(("endpoint", *self.descent.descended(ranked, n, deadline)))
        if method in ("auto", "rows") and not self.ground.stochastic:
            self.pace.say(f"{n} steps: rows")
            candidates += [("rows", k, e) for k, e in self.descent.rowed(trajectories, candidates, n, deadline)]
        if method in ("klub", "trajectory"):
            candidates = [c for c in candidates if c[0] == method] or candidates
        by, knots, _ = min(candidates, key=lambda c: c[2])
        plain = min((c for c in candidates if c[1].rows is None), key=lambda c: c[2])[1]
        self.pace.say(f"{n} steps: verdict")
        chosen = {m: short(min(e for b, _, e in candidates if b == m)) for m in dict.fromkeys(c[0] for c in candidates)}
        return self.verdict.of(n, by, knots, plain, known, chosen)
