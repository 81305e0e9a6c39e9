"""Schedules that are known: every published table and usual spacing, as candidates and as what must be beaten."""

from __future__ import annotations

import itertools

from ..errors import FewstepError
from ..schedules import compile_program
from .problem import Knots, Problem

PUBLISHED = ("ays_sd", "ays_sdxl", "gits")
"""Tables that others published."""
USUAL = ("linspace", "trailing", "leading", "sgm_uniform", "karras", "exponential", "beta", "kl_optimal", "lu")
"""Spacings by formula; linspace is uniform in time."""
CURVE = (12, 15, 20, 30)
"""Numbers of steps at which published tables are looked at beyond those that are searched."""


def known_schedules(problem: Problem, steps: int) -> list[Knots]:
    """Those that the sampler has at so many steps, with the timesteps that they feed where they pick timesteps."""
    candidates = []
    for name in (*PUBLISHED, *USUAL):
        try:
            program = compile_program(
                problem.sampler, schedule=name, steps=steps, noise=problem.noise, **problem.options
            )
        except FewstepError:
            continue  # a table for another noise schedule, or a spacing that has not so many steps
        sigmas = tuple(map(float, program.sigmas))
        if len(sigmas) != steps + 1 or any(a <= b for a, b in itertools.pairwise(sigmas)):
            continue
        candidates.append(Knots(name=name, sigmas=sigmas))
    return candidates
