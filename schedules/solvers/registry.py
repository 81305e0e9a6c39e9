"""Every sampler by name, with what a person and the compiler need to know of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ...errors import UnknownNameError
from . import consistency, ddim, dpmpp, euler, multistep, twostage, unipc

EULER = "Karras et al. 2022, arXiv 2206.00364"
KDIFF = "Crowson, k-diffusion"
DPMPP = "Lu et al. 2022, arXiv 2211.01095"
DEIS = "Zhang & Chen 2022, arXiv 2204.13902"
UNIPC = "Zhao et al. 2023, arXiv 2302.04867"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """One sampler.

    solve: the function that runs it on symbols, in coordinates `space`; presets: arguments that make it this one.
    order: of accuracy in the step size, as stated by its source (for stochastic ones, with the noise taken away).
    stages: evaluations of the network per step, and extra_evaluations beside them (PLMS: 1).
    draws: when it draws noise: "never", "always", or in words. exact: whether, given the true x0 and a schedule
    that ends at sigma 0, it ends on it.
    infinite_top: whether it can start where no signal is left at all (zero terminal SNR), rather than just below.
    schedule: the spacing it takes if none is asked for.
    """

    name: str
    solve: Callable[..., Any]
    space: Literal["ve", "vp"]
    order: int
    source: str
    presets: Mapping[str, Any] = field(default_factory=dict)
    stages: int = 1
    extra_evaluations: int = 0
    draws: str = "never"
    exact: bool = True
    infinite_top: bool = False
    schedule: str = "trailing"
    diffusers: str | None = None

    @property
    def latent_space(self) -> Literal["ve", "vp"]:
        """The coordinates of the latents that diffusers' scheduler of this sampler hands around."""
        return "ve" if self.space == "ve" and self.diffusers not in _VP_SCHEDULERS else "vp"

    @property
    def options(self) -> dict[str, Any]:
        """The keyword options that a caller may set, with their defaults."""
        parameters = inspect.signature(self.solve).parameters.values()
        own = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        return {name: value for name, value in own.items() if name not in self.presets and name not in _INTERNAL}

    @property
    def summary(self) -> str:
        return (self.solve.__doc__ or "").split("\n")[0].rstrip(".")


_VP_SCHEDULERS = (
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
)

_INTERNAL = ("published", "restart", "mix_raw", "variance_floor", "single")
"""Arguments that choose diffusers' reading of a sampler; set by the compatibility layer alone."""


def _multistep(order: int) -> list[Sampler]:
    name = f"dpmpp_{order}m"
    common: dict[str, Any] = {"solve": dpmpp.dpmpp_multistep, "space": "ve", "source": DPMPP, "order": order}
    common["diffusers"] = "DPMSolverMultistepScheduler"
    return [
        Sampler(name=name, presets={"order": order}, **common),
        Sampler(name=f"{name}_sde", presets={"order": order, "sde": True}, draws="always", **common),
    ]


def _singlestep(order: int) -> list[Sampler]:
    name = f"dpmpp_{order}s"
    common: dict[str, Any] = {"solve": dpmpp.dpmpp_singlestep, "space": "ve", "source": DPMPP, "order": order}
    common["diffusers"] = "DPMSolverSinglestepScheduler"
    return [
        Sampler(name=name, presets={"order": order}, **common),
        Sampler(name=f"{name}_sde", presets={"order": order, "sde": True}, draws="always", **common),
    ]


_ALL: list[Sampler] = [
    Sampler(
        name="euler",
        solve=euler.euler,
        space="ve",
        order=1,
        source=EULER,
        draws="with s_churn",
        diffusers="EulerDiscreteScheduler",
    ),
    Sampler(
        name="euler_ancestral",
        solve=euler.euler_ancestral,
        space="ve",
        order=1,
        source=KDIFF,
        draws="always",
        diffusers="EulerAncestralDiscreteScheduler",
    ),
    Sampler(
        name="heun",
        solve=twostage.heun,
        space="ve",
        order=2,
        source=EULER,
        stages=2,
        diffusers="HeunDiscreteScheduler",
    ),
    Sampler(
        name="kdpm2",
        solve=twostage.kdpm2,
        space="ve",
        order=2,
        source=KDIFF,
        stages=2,
        diffusers="KDPM2DiscreteScheduler",
    ),
    Sampler(
        name="kdpm2_ancestral",
        solve=twostage.kdpm2_ancestral,
        space="ve",
        order=2,
        source=KDIFF,
        stages=2,
        draws="second stages",
        diffusers="KDPM2AncestralDiscreteScheduler",
    ),
    Sampler(name="lms", solve=multistep.lms, space="ve", order=4, source=KDIFF, diffusers="LMSDiscreteScheduler"),
    Sampler(
        name="ddim",
        solve=ddim.ddim,
        space="vp",
        order=1,
        source="Song et al. 2020, arXiv 2010.02502",
        draws="with eta > 0",
        infinite_top=True,
        diffusers="DDIMScheduler",
    ),
    Sampler(
        name="ddpm",
        solve=ddim.ddpm,
        space="vp",
        order=1,
        source="Ho et al. 2020, arXiv 2006.11239",
        draws="but at the last step",
        infinite_top=True,
        diffusers="DDPMScheduler",
    ),
    Sampler(
        name="plms",
        solve=multistep.plms,
        space="vp",
        order=2,
        source="Liu et al. 2022, arXiv 2202.09778",
        extra_evaluations=1,
        diffusers="PNDMScheduler",
    ),
    *_multistep(1),
    *_multistep(2),
    *_multistep(3),
    *_singlestep(1),
    *_singlestep(2),
    *_singlestep(3),
    Sampler(
        name="dpmpp_sde",
        solve=twostage.dpmpp_sde,
        space="ve",
        order=2,
        source=f"{KDIFF}; {DPMPP}",
        stages=2,
        draws="always, one Brownian path a step",
        diffusers="DPMSolverSDEScheduler",
    ),
    *[
        Sampler(
            name=f"deis_{order}",
            solve=multistep.deis,
            space="ve",
            order=order,
            source=DEIS,
            presets={"order": order},
            diffusers="DEISMultistepScheduler",
        )
        for order in (1, 2, 3)
    ],
    *[
        Sampler(
            name=f"unipc_{order}",
            solve=unipc.unipc,
            space="ve",
            order=order + 1,
            source=UNIPC,
            presets={"order": order},
            diffusers="UniPCMultistepScheduler",
        )
        for order in (1, 2, 3)
    ],
    Sampler(
        name="lcm",
        solve=consistency.lcm,
        space="vp",
        order=1,
        source="Luo et al. 2023, arXiv 2310.04378",
        draws="but at the last step",
        exact=False,
        infinite_top=True,
        schedule="lcm",
        diffusers="LCMScheduler",
    ),
    Sampler(
        name="tcd",
        solve=consistency.tcd,
        space="vp",
        order=1,
        source="Zheng et al. 2024, arXiv 2402.19159",
        draws="with eta > 0, but at the last step",
        infinite_top=True,
        schedule="lcm",
        diffusers="TCDScheduler",
    ),
    Sampler(
        name="edm_euler",
        solve=euler.euler,
        space="ve",
        order=1,
        source=EULER,
        draws="with s_churn",
        schedule="karras",
        diffusers="EDMEulerScheduler",
    ),
]

SAMPLERS: dict[str, Sampler] = {sampler.name: sampler for sampler in _ALL}


def find_sampler(name: str) -> Sampler:
    """The sampler of a canonical name; raises UnknownNameError with the nearest."""
    if name not in SAMPLERS:
        raise UnknownNameError("sampler", name, SAMPLERS)
    return SAMPLERS[name]
