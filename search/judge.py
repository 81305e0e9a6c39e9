"""Who chooses: mean distances to the teacher's results on pairs that nothing is searched on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .journal import Journal, knots_to_json
from .problem import Knots, Pairs, Problem, mean_distance


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """Distances on `pairs`, each candidate's once, whatever it is called; a killed search's are kept."""

    problem: Problem
    pairs: Pairs
    journal: Journal

    def distances(self, candidates: Sequence[Knots]) -> list[float]:
        """Of each candidate; those not known yet are run together."""

        def find(places: Sequence[int]) -> list[float]:
            errors = self.problem.errors([candidates[i] for i in places], self.pairs)
            return [mean_distance(e) for e in errors]

        return [float(d) for d in self.journal.values([_key(k) for k in candidates], find)]

    def distance(self, knots: Knots) -> float:
        return self.distances([knots])[0]

    def best(self, candidates: Sequence[Knots]) -> Knots:
        return candidates[int(np.argmin(self.distances(candidates)))]


def _key(knots: Knots) -> str:
    what = {k: v for k, v in knots_to_json(knots).items() if k != "name"}
    return f"distance-{hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]}"
