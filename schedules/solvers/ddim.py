"""DDIM and its relatives, in VP coordinates: x = alpha x0 + s eps."""

from __future__ import annotations

import math

from ..algebra import Form, Tape
from ..levels import Level, Path
from .sampler import sampler


def posterior_variance(here: Level, there: Level) -> float:
    """The variance of q(x_there | x_here, x0): (1 - ab') / (1 - ab) * (1 - ab / ab')."""
    return (there.s / here.s) ** 2 * (1 - (here.alpha / there.alpha) ** 2)


@sampler(
    space="vp",
    group="ddpm",
    order=1,
    source="Song et al. 2020, arXiv 2010.02502",
    draws="with eta > 0",
    infinite_top=True,
    diffusers="DDIMScheduler",
)
def ddim(model: Tape, path: Path, x: Form, *, eta: float = 0.0) -> Form:
    """Song et al. 2020 (arXiv 2010.02502), eq. 12; eta = 0 is deterministic, eta = 1 is DDPM's variance."""
    for here, there in path.pairs:
        at = model(x, here)
        variance = eta**2 * posterior_variance(here, there)
        x = there.alpha * at.x0 + math.sqrt(max(there.s**2 - variance, 0.0)) * at.eps
        if eta > 0.0:
            x = x + math.sqrt(variance) * model.noise()
    return x


@sampler(
    space="vp",
    group="ddpm",
    order=1,
    source="Ho et al. 2020, arXiv 2006.11239",
    draws="but at the last step",
    infinite_top=True,
    diffusers="DDPMScheduler",
)
def ddpm(
    model: Tape,
    path: Path,
    x: Form,
    *,
    large_variance: bool = False,
    learned_variance: bool = False,
    variance_floor: float = 0.0,
) -> Form:
    """Ho et al. 2020 (arXiv 2006.11239), eq. 7, on a subset of the timesteps; the last step adds no noise.

    large_variance: beta_t rather than the posterior's variance. learned_variance: what the network says between these
    two (Nichol and Dhariwal 2021, arXiv 2102.09672, eq. 15). variance_floor: diffusers has 1e-20 here, and draws
    noise wherever t > 0, the last step included.
    """
    for here, there in path.pairs:
        ratio = (here.alpha / there.alpha) ** 2
        x0 = model(x, here).x0
        a = math.sqrt(ratio) * (there.s / here.s) ** 2
        b = there.alpha * (1 - ratio) / here.s**2
        variance = 1 - ratio if large_variance else posterior_variance(here, there)
        variance, spread = max(variance, variance_floor), 0.0
        if learned_variance and variance > 0.0:
            # exp(((1 + v) log beta + (1 - v) log beta~) / 4) = (beta beta~)^(1/4) exp(v log(beta / beta~) / 4)
            variance, spread = math.sqrt((1 - ratio) * variance), math.log((1 - ratio) / variance) / 4
        x = a * x + b * x0
        if (here.t if variance_floor else there.sigma) > 0:
            x = x + math.sqrt(variance) * model.noise(spread)
    return x
