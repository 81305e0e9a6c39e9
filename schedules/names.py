"""One alias table: fewstep's names, diffusers' classes, A1111's and ComfyUI's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import UnknownNameError, UnsupportedError
from .solvers.registry import SAMPLERS
from .spacing import SPACINGS


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """What an alias stands for: a sampler, the schedule its name carries (or None), and options it implies."""

    name: str
    schedule: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


SEARCHED = "searched"
"""The schedule that was found for one model: what pictures record of any, and a bundle offers of its own."""
SCHEDULE_ALIASES: dict[str, str] = {
    "normal": "linspace",
    "uniform": "linspace",
    "ddim_uniform": "leading",
    "sgm": "sgm_uniform",
    "lu_lambdas": "lu",
    "Polyexponential": "exponential",
    "KL Optimal": "kl_optimal",
    "ays": "ays_sd",
    "Align Your Steps": "ays_sd",
    "ays_sd15": "ays_sd",
    "ays_xl": "ays_sdxl",
    "ays_if": "ays_deepfloyd",
    "StableDiffusionTimesteps": "ays_sd",
    "StableDiffusionXLTimesteps": "ays_sdxl",
    "StableDiffusionVideoSigmas": "ays_svd",
    "AlignYourStepsScheduler": "ays_sd",
    "KarrasScheduler": "karras",
    "ExponentialScheduler": "exponential",
    "PolyexponentialScheduler": "exponential",
    "BetaSamplingScheduler": "beta",
    "SDTurboScheduler": "turbo_tenths",
    "GITSScheduler": "gits",
}

SAMPLER_ALIASES: dict[str, str] = {
    "dpmsolver++": "dpmpp_2m",
    "sde-dpmsolver++": "dpmpp_2m_sde",
    "SamplerEulerAncestral": "euler_ancestral",
    "SamplerLMS": "lms",
    "SamplerDPMPP_SDE": "dpmpp_sde",
    "SamplerDPMPP_2M_SDE": "dpmpp_2m_sde",
    "SamplerDPMPP_3M_SDE": "dpmpp_3m_sde",
}
"""Names beside those that the samplers state: diffusers' `algorithm_type`, and ComfyUI's nodes."""
FLAX = "flax"
"""What diffusers' schedulers for Flax put before the name of the class that they are."""

_REFUSED = {
    "DPM++ 2S a": "its ancestral two-stage steps",
    "dpmpp_2s_ancestral": "its ancestral two-stage steps",
    "DPM fast": "its fixed orders",
    "DPM adaptive": "step sizes that depend on the image, which no table can hold",
    "Restart": "its restarts",
    "heunpp2": "its three-stage steps",
    "ipndm": "its higher orders",
    "ipndm_v": "its higher orders",
    "DDIM CFG++": "its guidance inside the step",
    "euler_cfg_pp": "its guidance inside the step",
    "euler_ancestral_cfg_pp": "its guidance inside the step",
    "FlowMatchEulerDiscreteScheduler": "flow matching",
    "FlowMatchHeunDiscreteScheduler": "flow matching",
    "UnCLIPScheduler": "learned variance",
    "RePaintScheduler": "its resampling",
    "ScoreSdeVeScheduler": "a corrector that depends on the image's norm",
    "ConsistencyDecoderScheduler": "pixel decoding",
    "CMStochasticIterativeScheduler": "consistency models trained on EDM's axis",
    "SASolverScheduler": "its stochastic Adams steps",
    "DDIMInverseScheduler": "inversion",
    "DPMSolverMultistepInverseScheduler": "inversion",
    "CosineDPMSolverMultistepScheduler": "its trigonometric axis",
    "EDMDPMSolverMultistepScheduler": "it runs as a checkpoint's own scheduler alone",
    "DDPMParallelScheduler": "parallel sampling",
    "DDIMParallelScheduler": "parallel sampling",
    "KarrasVeScheduler": "its churned Heun steps on an axis of its own",
    "dpmsolver": "its steps without the plus signs",
    "sde-dpmsolver": "its steps without the plus signs",
    "SamplerDPMPP_2S_Ancestral": "its ancestral two-stage steps",
    "SamplerDPMAdaptative": "step sizes that depend on the image, which no table can hold",
    "SamplerEulerAncestralCFGPP": "its guidance inside the step",
    "SamplerEulerCFGpp": "its guidance inside the step",
    "SamplerSASolver": "its stochastic Adams steps",
    "SamplerER_SDE": "its stages of an SDE of its own",
    "SamplerLCMUpscale": "its upscaling between steps",
}
_REFUSED_SCHEDULES = {
    "LaplaceScheduler": "Laplace's quantiles",
    "VPScheduler": "betas of a continuous VP process",
    "OptimalStepsScheduler": "tables of flow models",
    "BasicScheduler": "it takes the name of another",
}

_GUIDED_INSIDE = ("_cfg_pp", "_cfgpp")
"""How the names of samplers end that mix the two rows within a step: whatever their solver."""
_SUFFIXES = ("karras", "exponential", "sgm_uniform", "uniform", "beta", "simple", "normal", "align_your_steps")


def fold(name: str) -> str:
    """The form in which names are compared: "DPM++ 2M Karras" is "dpmpp_2m_karras"."""
    return name.strip().casefold().replace("++", "pp").replace("-", "_").replace(" ", "_")


_FOLDED_REFUSED = {fold(k): v for k, v in _REFUSED.items()}
_FOLDED_REFUSED_SCHEDULES = {fold(k): v for k, v in _REFUSED_SCHEDULES.items()}
_FOLDED_SCHEDULES = {**{fold(k): v for k, v in SCHEDULE_ALIASES.items()}, **{k: k for k in (*SPACINGS, SEARCHED)}}


def resolve_sampler(name: str) -> Resolved:
    """What a sampler name of any of the four families means.

    Raises UnsupportedError for a known one that is not done, UnknownNameError with the nearest for any other.
    """
    key = fold(scheduler_class(str(name)))
    known = _lookup(key)
    if known:
        return known
    for suffix in _SUFFIXES:
        base = _lookup(key.removesuffix(f"_{suffix}")) if key.endswith(f"_{suffix}") else None
        if base:
            return Resolved(name=base.name, schedule=_FOLDED_SCHEDULES[suffix], options=base.options)
    why = _why_refused(key)
    if why is not None:
        raise UnsupportedError(
            f"the sampler {name!r} is known and not done, for {why}",
            expected="one that is",
            remedy="See: fewstep samplers.",
        )
    raise UnknownNameError("sampler", name, [*SAMPLERS, *sampler_aliases()], remedy="See: fewstep samplers.")


def resolve_schedule(name: str) -> str:
    """The canonical name of a schedule; raises UnknownNameError with the nearest."""
    key = fold(str(name))
    if key in _FOLDED_REFUSED_SCHEDULES:
        raise UnsupportedError(
            f"the schedule {name!r} is known and not done, for {_FOLDED_REFUSED_SCHEDULES[key]}",
            expected="one that is",
            remedy="See: fewstep samplers.",
        )
    if key not in _FOLDED_SCHEDULES:
        known = [*SPACINGS, SEARCHED, *SCHEDULE_ALIASES]
        raise UnknownNameError("schedule", name, known, remedy="See: fewstep samplers.")
    return _FOLDED_SCHEDULES[key]


def scheduler_class(name: str) -> str:
    """The class of diffusers that a class's name stands for: Flax's are the same schedulers."""
    flax = name.casefold().startswith(FLAX) and name.casefold().endswith("scheduler")
    return name[len(FLAX) :] if flax else name


def sampler_aliases() -> dict[str, Resolved]:
    """Every other name of a sampler, diffusers' class and the user interfaces' included."""
    stated = {
        alias: Resolved(name=sampler.name, options=options)
        for sampler in SAMPLERS.values()
        for alias, options in sampler.aliases.items()
    }
    return stated | {alias: Resolved(name=name) for alias, name in SAMPLER_ALIASES.items()}


def sampler_aliases_of(sampler: str) -> tuple[str, ...]:
    return tuple(alias for alias, resolved in sampler_aliases().items() if resolved.name == sampler)


def schedule_aliases_of(schedule: str) -> tuple[str, ...]:
    return tuple(alias for alias, name in SCHEDULE_ALIASES.items() if name == schedule)


def _why_refused(key: str) -> str | None:
    """Why a known sampler is not done, with a schedule behind its name too ("DPM++ 2S a Karras")."""
    bases = [key, *(key.removesuffix(f"_{s}") for s in _SUFFIXES if key.endswith(f"_{s}"))]
    if any(base.endswith(_GUIDED_INSIDE) for base in bases):
        return _FOLDED_REFUSED["euler_cfg_pp"]
    return next((_FOLDED_REFUSED[base] for base in bases if base in _FOLDED_REFUSED), None)


def _lookup(key: str) -> Resolved | None:
    if key in SAMPLERS:
        return Resolved(name=key)
    return next((r for alias, r in sampler_aliases().items() if fold(alias) == key), None)
