"""Levels that a diffusers scheduler holds once its `set_timesteps` has run, whoever wrote that, as a class's layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...errors import ArgumentError, UnsupportedError
from ..levels import Level
from . import layouts as grids
from .classes import CLASSES
from .layouts import Grid, GridRequest

TWO_STAGES = (
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler",
)
"""They hold the levels of both their stages, one after another."""


def held_layout(
    class_name: str, timesteps: Sequence[float], sigmas: Sequence[float] | None, steps: int, init_noise: float
) -> Callable[[GridRequest], Grid]:
    """The layout of levels that a scheduler of this class holds.

    timesteps [n]: what the network is fed. sigmas [n + 1]: the classes' that step in sigma. steps: what the scheduler
    takes for its number of steps, from which DDIM tells where a step ends. init_noise: the noise's factor at the start.
    Raises `UnsupportedError` for a class whose steps are not told by these, `ArgumentError` for lists that do not fit.
    """
    family = CLASSES[class_name].layout
    in_sigma = family in (grids.k_family, grids.multistep_family) and class_name not in TWO_STAGES
    if not in_sigma and family not in (grids.ddim_family, grids.ddpm_family, grids.lcm_family):
        raise UnsupportedError(
            f"a set_timesteps of one's own in a subclass of {class_name}",
            expected="a subclass of a scheduler whose steps its timesteps and sigmas tell",
        )
    if in_sigma and (sigmas is None or len(sigmas) != len(timesteps) + 1):
        raise ArgumentError(
            f"the scheduler holds {0 if sigmas is None else len(sigmas)} sigmas and {len(timesteps)} timesteps",
            expected="one sigma more, where the last step ends",
        )

    def lay_out(request: GridRequest) -> Grid:
        if in_sigma and sigmas is not None:
            levels = [Level(float(t), float(s)) for t, s in zip(timesteps, sigmas, strict=False)]
            path = grids.chain([*levels, Level(0.0, float(sigmas[-1]))], request.start, request.tables)
            return Grid(path=path, init_noise=init_noise)
        if family is grids.ddim_family:
            back = request.tables.count // steps
            pairs = [(request.tables.at_timestep(t), grids.or_end(request, t - back, keep=False)) for t in timesteps]
            return grids.vp_grid(request, pairs)
        end = Level(-1.0, 0.0) if family is grids.ddpm_family else grids.end_of_lcm(request)
        return grids.vp_grid(request, grids.next_pairs(request, timesteps, end))

    return lay_out
