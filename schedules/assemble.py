"""From a sampler and a path to a program: run it on symbols and lay out the rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .algebra import Tape
from .clip import Bound
from .levels import Path, Preconditioning
from .program import Program, program_from_rows
from .solvers.registry import Sampler


def assemble(
    sampler: Sampler,
    path: Path,
    *,
    schedule: str,
    prediction: str,
    init: tuple[float, float],
    options: Mapping[str, Any],
    bound: Bound | None = None,
) -> Program:
    """Compile one sampler along one path.

    init: factors of latent and Gaussian in the starting network input. options: keyword arguments of the sampler.
    bound: clip x0 to it.
    """
    precondition = Preconditioning(prediction=prediction)
    tape = Tape(precondition, space=sampler.space, clips=None if bound is None else sampler.clips)
    result = sampler.solve(tape, path, tape.start(path.first), **{**sampler.presets, **options})
    if sampler.space == "ve" and sampler.latent_space == "vp":
        result = path.last.alpha * result
    rows = tape.finish(result)
    readings = [precondition.at(row.told) for row in rows]
    scales = [1.0 / row.level.scale if sampler.latent_space == "ve" else 1.0 for row in rows]
    return program_from_rows(
        rows,
        names=(sampler.name, schedule, prediction),
        steps=path.total,
        start=path.skipped,
        init=init,
        previews=[(reading.x0_x, reading.x0_out) for reading in readings],
        state_scale=[*scales, 1.0],
        final_sigma=path.last.sigma,
        anchored=tape.anchored,
        bound=bound,
    )
