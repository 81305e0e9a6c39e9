"""Euler's method and its stochastic relatives, in VE coordinates: x = x0 + sigma noise, dx/dsigma = eps.

A step x + (sigma' - sigma) eps is written as x0 + sigma' eps, which is the same and loses nothing where sigma is large:
x and sigma eps are nearly equal there.
"""

from __future__ import annotations

import math
from dataclasses import replace

from ..algebra import Form, Tape
from ..levels import Level, Path
from .sampler import sampler

KARRAS = "Karras et al. 2022, arXiv 2206.00364"
K_DIFFUSION = "Crowson, k-diffusion"


@sampler(
    space="ve",
    group="sigma",
    order=1,
    source=KARRAS,
    draws="with s_churn",
    diffusers="EulerDiscreteScheduler",
    aliases=["k_euler"],
)
@sampler(
    "edm_euler",
    space="ve",
    group="edm",
    order=1,
    source=KARRAS,
    draws="with s_churn",
    schedule="karras",
    diffusers="EDMEulerScheduler",
)
def euler(
    model: Tape,
    path: Path,
    x: Form,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Form:
    """Karras et al. 2022 (arXiv 2206.00364), Algorithm 2 without the second-order correction.

    With `s_churn`, noise is added before the network is called, as in the paper, so that the network is fed the
    level that the state is at. The first step is never churned: its state is fresh noise already.
    """
    for i, (here, there) in enumerate(path.pairs):
        gamma = min(s_churn / path.total, math.sqrt(2) - 1) if i and s_tmin <= here.sigma <= s_tmax else 0.0
        if gamma > 0.0:
            raised = path.at_sigma(here.sigma * (1 + gamma))
            x = x + s_noise * math.sqrt(raised.sigma**2 - here.sigma**2) * model.noise()
            here = raised
        at = model(x, here, keep="out")
        x = at.x0 + there.sigma * at.eps
    return x


def euler_churned_late(
    model: Tape,
    path: Path,
    x: Form,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Form:
    """diffusers' reading of the same algorithm: the churn noise comes after the network has been called.

    The raw output is then read at the raised sigma (epsilon) or at the lower one (v), and x0 of the churned state.
    """
    for here, there in path.pairs:
        gamma = min(s_churn / path.total, math.sqrt(2) - 1) if s_tmin <= here.sigma <= s_tmax else 0.0
        raised = here.sigma * (1 + gamma)
        if gamma == 0.0:
            at = model(x, here, keep="out")
            x = at.x0 + there.sigma * at.eps
            continue
        out = model(x, here, keep="out").out
        x = x + s_noise * math.sqrt(raised**2 - here.sigma**2) * model.noise()
        x0 = late_x0(model, x, out, here, raised)
        x = x0 + there.sigma / raised * (x - x0)
    return x


def late_x0(model: Tape, x: Form, out: Form, here: Level, raised: float) -> Form:
    """x0 of the churned state: epsilon and EDM outputs are read at the raised sigma, v at the one of the call."""
    if model.precondition.prediction == "sample":
        return out
    level = here if model.precondition.prediction == "v_prediction" else replace(here, sigma=raised)
    reading = model.precondition.at(level)
    return reading.x0_x * level.scale * x + reading.x0_out * out


def ancestral_split(here: float, there: float) -> tuple[float, float]:
    """sigma_down, sigma_up of one ancestral step: down^2 + up^2 = there^2 (k-diffusion's get_ancestral_step, eta 1)."""
    up = math.sqrt(there**2 * (here**2 - there**2) / here**2)
    return math.sqrt(there**2 - up**2), up


@sampler(
    space="ve",
    group="sigma",
    order=1,
    source=K_DIFFUSION,
    draws="always",
    diffusers="EulerAncestralDiscreteScheduler",
    aliases=["Euler a", "k_euler_ancestral"],
)
def euler_ancestral(model: Tape, path: Path, x: Form) -> Form:
    """Ancestral sampling with Euler steps: down to sigma_down, then noise up to the next level."""
    for here, there in path.pairs:
        down, up = ancestral_split(here.sigma, there.sigma)
        at = model(x, here, keep="out")
        x = at.x0 + down * at.eps + up * model.noise()
    return x
