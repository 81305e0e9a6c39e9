"""Samplers with a second stage in each step, in VE coordinates. A last step to sigma 0 is one Euler step."""

from __future__ import annotations

import math

from ..algebra import Form, Tape
from ..levels import Path
from .dpmpp import DPMPP
from .euler import K_DIFFUSION, KARRAS, ancestral_split
from .sampler import sampler


@sampler(space="ve", group="sigma", order=2, source=KARRAS, stages=2, diffusers="HeunDiscreteScheduler", clips="eps")
def heun(model: Tape, path: Path, x: Form) -> Form:
    """Karras et al. 2022 (arXiv 2206.00364), Algorithm 1: Euler, then the mean of the slopes at both ends."""
    for here, there in path.pairs:
        d = model(x, here, keep="eps").eps
        dt = there.sigma - here.sigma
        y = x + dt * d
        if there.sigma > 0.0:
            y = x + dt / 2 * (d + model(y, there, keep="eps").eps)
        x = y
    return x


@sampler(
    space="ve",
    group="sigma",
    order=2,
    source=K_DIFFUSION,
    stages=2,
    diffusers="KDPM2DiscreteScheduler",
    aliases=["DPM2", "dpm_2"],
)
def kdpm2(model: Tape, path: Path, x: Form) -> Form:
    """k-diffusion's DPM-Solver-2: a midpoint step whose middle is the geometric mean of both sigmas."""
    for here, there in path.pairs:
        x = _through_middle(model, path, x, here.sigma, there.sigma, model(x, here, keep="eps").eps)
    return x


@sampler(
    space="ve",
    group="sigma",
    order=2,
    source=K_DIFFUSION,
    stages=2,
    draws="second stages",
    diffusers="KDPM2AncestralDiscreteScheduler",
    aliases=["DPM2 a", "dpm_2_ancestral"],
)
def kdpm2_ancestral(model: Tape, path: Path, x: Form) -> Form:
    """The same down to sigma_down, then noise up to the next level."""
    for here, there in path.pairs:
        down, up = ancestral_split(here.sigma, there.sigma)
        x = _through_middle(model, path, x, here.sigma, down, model(x, here, keep="eps").eps)
        if there.sigma > 0.0:
            x = x + up * model.noise()
    return x


def _through_middle(model: Tape, path: Path, x: Form, sigma: float, target: float, d: Form) -> Form:
    if target > 0.0:
        middle = path.at_sigma(math.sqrt(sigma * target))
        d = model(x + (middle.sigma - sigma) * d, middle, keep="eps").eps
    return x + (target - sigma) * d


@sampler(
    space="ve",
    group="lambda",
    order=2,
    source=f"{K_DIFFUSION}; {DPMPP}",
    stages=2,
    draws="always, one Brownian path a step",
    diffusers="DPMSolverSDEScheduler",
    aliases=["DPM++ SDE", "dpmpp_sde_gpu"],
)
def dpmpp_sde(model: Tape, path: Path, x: Form, *, s_noise: float = 1.0) -> Form:
    """DPM-Solver++ (SDE) of k-diffusion: two ancestral exponential steps from one state, to the middle and beyond it.

    Both stages see one Brownian path W in sigma: n1 is its unit increment down to the middle and n2 the one from
    there on, so that the second stage's noise is their sum over the whole step.
    """
    for here, there in path.pairs:
        x0 = model(x, here).x0
        if there.sigma == 0.0:
            return x0
        if there.sigma == here.sigma:
            continue
        middle = path.at_sigma(math.sqrt(here.sigma * there.sigma))
        down, up = ancestral_split(here.sigma, middle.sigma)
        n1 = model.noise()
        y = down / here.sigma * x + (1 - down / here.sigma) * x0 + s_noise * up * n1
        x0 = model(y, middle).x0
        down, up = ancestral_split(here.sigma, there.sigma)
        first, second = here.sigma - middle.sigma, middle.sigma - there.sigma
        whole = (math.sqrt(first) * n1 + math.sqrt(second) * model.noise()) / math.sqrt(first + second)
        x = down / here.sigma * x + (1 - down / here.sigma) * x0 + s_noise * up * whole
    return x
