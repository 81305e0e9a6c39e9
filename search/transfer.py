"""What a found schedule is worth elsewhere: at another guidance, another size, with a LoRA, on another checkpoint."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..runtime import Pipeline
from ..runtime.arguments import check_integer, check_real
from ..schedules import FoundSchedules, NoiseSchedule
from .ground import Ground
from .journal import Journal
from .judging import compare
from .known import known_schedules
from .noise import draws_of
from .pace import Pace, Progress
from .problem import Problem, square_distances
from .sets import Counts, make_sets
from .settings import read_settings
from .verdict import FOUND


def check_schedules(
    pipeline: Pipeline,
    found: FoundSchedules,
    *,
    prompts: Sequence[str] | None = None,
    guidances: Sequence[float] | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
    steps: Sequence[int] | None = None,
    negative: str | None = None,
    loras: Mapping[str, Any] | None = None,
    pairs: int = 64,
    seed: int = 1_000_000,
    teacher_steps: int = 100,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Compare found schedules with every known one on a pipeline, at each guidance and size: a row a number of steps.

    guidances, sizes (width, height): those that it was found at if `None`. steps: all that were searched if `None`.
    loras: on every pair, the teacher's too. pairs: prompts with seeds; the seeds from `seed` on, which no search takes
    by itself, and prompts that should be others than those of the search. A row has `guidance`, `size`, `steps` and
    what `judging.compare` says, with distances to the teacher at that guidance and size.

    Raises `MismatchError` for another model than it was found for, unless it was loaded with `force`, and what
    `search_schedules` raises.
    """
    bundle = pipeline.bundle
    found.check(model=bundle.unet_digest, sampler=None)
    noise = NoiseSchedule.from_diffusers(bundle.noise_config)
    pace = Pace(journal=Journal(None, {}), budget=1.0, progress=progress)
    draws = draws_of(found.sampler, float(noise.sigmas[0]), float(noise.sigmas[-1]), seed)
    counts = Counts(search=1, choose=1, held_out=check_integer("pairs", pairs, 2, 4096))
    asked = tuple(found.steps if steps is None else steps)
    rows = []
    for guidance, size in itertools.product(guidances or (found.guidance,), sizes or (found.size,)):
        pace.say(f"guidance {guidance:g}, {size[0]}x{size[1]}")
        settings = read_settings(
            pipeline,
            sampler=found.sampler,
            steps=asked,
            prompts=prompts,
            guidance=check_real("guidance", guidance, 0.0, 1000.0),
            size=size,
            negative=negative,
            method="auto",
            pairs=4,
            held_out=8,
            teacher_steps=teacher_steps,
            seed=seed,
            student=bool(found.made.get("student", False)),
            options=None,
            pictures=(),
        )
        ground = Ground(pipeline=pipeline, settings=settings, pace=pace, noise=noise, draws=draws)
        sets = make_sets(
            pipeline,
            settings.prompts,
            counts,
            seed=seed,
            guidance=settings.guidance,
            size=size,
            negative=negative,
            loras=loras,
        )
        problem: Problem = ground.problem(sets)
        held_out = ground.teach(problem, sets.held_out)
        for n in asked:
            known = known_schedules(problem, n)
            programs = [found.program(n, noise=noise), *(problem.program(k) for k in known)]
            results = problem.run([(p, held_out) for p in programs])
            distances = {
                name: np.sqrt(square_distances(result, held_out))
                for name, result in zip([FOUND, *(k.name for k in known)], results, strict=True)
            }
            rows.append({"guidance": guidance, "size": list(size), "steps": n, **compare(distances, FOUND)})
    return rows
