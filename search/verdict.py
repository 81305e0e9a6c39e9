"""The verdict on a schedule: held-out pairs, intervals, pictures, and how many steps the best table would need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..runtime import Pipeline
from ..schedules.found import FoundEntry
from .judging import compare, equal_error_steps, picture_figures, short
from .known import CURVE, PUBLISHED, known_schedules
from .pace import Pace
from .problem import Knots, Problem, mean_distance, square_distances
from .sets import Sets

FOUND = "found"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutVerdict:
    """What judges: held-out pairs, on a pipeline that decodes."""

    pipeline: Pipeline
    problem: Problem
    sets: Sets
    pace: Pace
    student: bool

    def of(
        self,
        n: int,
        by: str,
        knots: Knots,
        plain: Knots,
        known: Sequence[Knots],
        chosen: Mapping[str, float],
    ) -> tuple[FoundEntry, dict[str, Any]]:
        """The entry with its figures on held-out pairs; the best known schedule where what was found is no better."""
        pairs = self.sets.held_out
        distances = self.pace.journal.value(
            f"{n}-verdict",
            lambda: {
                name: [float(v) for v in np.sqrt(error)]
                for name, error in zip(
                    [FOUND, *(k.name for k in known)], self.problem.errors([knots, *known], pairs), strict=True
                )
            },
        )
        figures = compare({name: np.array(d) for name, d in distances.items()}, FOUND)
        beats = figures["ratio"]["high"] < 1.0
        report = {**figures, "method": by, "beats_known": beats, "chosen_by": dict(chosen)}
        report["pictures"] = self.pace.journal.value(f"{n}-pictures", lambda: self._pictures(knots, known, figures))
        if not beats:
            best = next(k for k in known if k.name == figures["best_known"])
            kept = {"kept": best.name, "because": "nothing found beats it on held-out pairs"}
            return best.entry("known", figures={**kept, **figures["known"][best.name]}), {**report, **kept}
        shown = {k: figures[k] for k in ("pairs", "latent_rmse", "best_known", "ratio", "wins")}
        return knots.entry(by, between=plain.sigmas if plain is not knots else None, figures=shown), report

    def _pictures(self, knots: Knots, known: Sequence[Knots], figures: Mapping[str, Any]) -> dict[str, Any]:
        """PSNR and SSIM of pictures against the teacher's, for a part of the held-out pairs."""
        few = self.sets.held_out.first(32)
        others = [k for k in known if k.name in (figures["best_known"], *PUBLISHED)]
        decode = self.pipeline.vae.decode_unguarded
        teachers = decode(np.asarray(few.finals, np.float32))
        results = self.problem.run([(self.problem.program(k), few) for k in (knots, *others)])
        names = [FOUND, *(k.name for k in others)]
        return {name: picture_figures(decode(r), teachers) for name, r in zip(names, results, strict=True)}

    def equal_error(self, entries: Sequence[FoundEntry]) -> dict[str, Any]:
        """By number of steps, how many the best published table needs for the error that was found, and their ratio.

        Tables are run at more and more steps, as long as the budget takes it.
        """
        if self.student or not entries:
            return {}
        self.pace.say("steps that published tables need")
        few = self.sets.held_out.first(self.sets.counts.curve)
        counts = sorted({*(e.steps for e in entries), *CURVE})

        def measured() -> dict[str, Any]:
            curves: dict[str, list[tuple[int, float]]] = {}
            most, a_step = 0, 0.0
            for n in counts:
                began = self.pace.journal.spent
                if most and not self.pace.in_time(self.pace.budget - a_step * n):
                    break
                tables = [k for k in known_schedules(self.problem, n) if k.name in PUBLISHED]
                for k, e in zip(tables, self.problem.errors(tables, few), strict=True):
                    curves.setdefault(k.name, []).append((n, mean_distance(e)))
                most, a_step = n, max(a_step, (self.pace.journal.spent - began) / n)
            programs = {e.steps: e.program(self.problem.sampler, noise=self.problem.noise) for e in entries}
            results = self.problem.run([(p, few) for p in programs.values()])
            found = {n: mean_distance(square_distances(r, few)) for n, r in zip(programs, results, strict=True)}
            told: dict[str, Any] = {}
            for n, error in found.items():
                if n > most:
                    continue
                needed = {name: equal_error_steps(error, curve) for name, curve in curves.items()}
                reached = [v for v in needed.values() if v is not None]
                best = min(reached) if reached else None
                told[str(n)] = {
                    "error": short(error),
                    "table_needs": None if best is None else short(best),
                    "more_than": None if best is not None else most,
                    "ratio": short((best or most) / n),
                }
            return told

        return dict(self.pace.journal.value("equal", measured))
