"""Samplers for consistency-distilled networks, in VP coordinates: jump towards x0, then noise back up."""

from __future__ import annotations

import math

import numpy as np

from ..algebra import Form, Tape
from ..levels import Path
from .sampler import sampler


@sampler(
    space="vp",
    group="distilled",
    order=1,
    source="Luo et al. 2023, arXiv 2310.04378",
    draws="but at the last step",
    exact=False,
    infinite_top=True,
    schedule="lcm",
    diffusers="LCMScheduler",
)
def lcm(model: Tape, path: Path, x: Form, *, timestep_scaling: float = 10.0, shifted_timestep: int = 0) -> Form:
    """Latent consistency models (Luo et al. 2023, arXiv 2310.04378), multistep sampling with the boundary scalings.

    The result of the last evaluation is the network's own estimate, at whatever level the schedule ends.
    shifted_timestep: what the network is told in the place of the number of training timesteps T, and of lower ones in
    proportion; its output is read at the level that it is told, while states stay at their own (NitroFusion, Chen et
    al. 2024, arXiv 2412.02030: tau = floor(t shifted / T)). 0: the timesteps themselves.
    """
    for i, (here, there) in enumerate(path.pairs):
        told = here
        if shifted_timestep:
            told = path.at_timestep(math.floor(here.t * shifted_timestep / path.trained))
        scaled = timestep_scaling * told.t
        c_skip = 0.25 / (scaled**2 + 0.25)
        c_out = scaled / math.sqrt(scaled**2 + 0.25)
        x = c_out * model(x, here, told=told).x0 + c_skip * x
        if i < len(path) - 1:
            x = there.alpha * x + there.s * model.noise()
    return x


@sampler(
    space="vp",
    group="distilled",
    order=1,
    source="Zheng et al. 2024, arXiv 2402.19159",
    draws="with eta > 0, but at the last step",
    infinite_top=True,
    schedule="lcm",
    diffusers="TCDScheduler",
)
def tcd(model: Tape, path: Path, x: Form, *, eta: float = 0.3, single: bool = False) -> Form:
    """Trajectory consistency distillation (Zheng et al. 2024, arXiv 2402.19159), Algorithm 4: strategic sampling.

    DDIM to timestep (1 - eta) t', then noise up to t'; eta = 0 is DDIM, eta = 1 is multistep consistency sampling.
    The last step goes to the end of the schedule with no noise. single: multiply in float32 before flooring, which
    may come out one timestep lower (diffusers).
    """
    for i, (here, there) in enumerate(path.pairs):
        at = model(x, here)
        last = i == len(path) - 1
        product = np.float32(1 - eta) * np.float32(there.t) if single else (1 - eta) * there.t
        aim = there if last else path.at_timestep(math.floor(product))
        x = aim.alpha * at.x0 + aim.s * at.eps
        if eta > 0.0 and not last:
            kept = there.alpha / aim.alpha
            x = kept * x + math.sqrt(max(1 - kept**2, 0.0)) * model.noise()
    return x
