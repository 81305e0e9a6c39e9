"""diffusers' own conventions: a scheduler config compiled to what diffusers' pipelines do with it, quirks included."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

from ...errors import ArgumentError, UnknownNameError, UnsupportedError
from ...values import Reader
from ..assemble import assemble
from ..clip import Bound
from ..keys import check_keys
from ..levels import EDM_PREDICTIONS
from ..names import resolve_sampler, scheduler_class
from ..noise import PREDICTIONS
from ..options import check_option
from ..program import Program
from ..refusals import finite_arithmetic, refuse_options
from ..solvers.registry import Sampler
from . import layouts as grids
from . import meanings
from .layouts import Grid, GridRequest
from .meanings import Config, Solved
from .tables import Tables

COMMON = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
SPACED = ("timestep_spacing", "steps_offset")
RESPACED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
SOLVER = ("solver_order", "solver_type", "lower_order_final")
FLOW = ("use_flow_sigmas", "use_dynamic_shifting")
CLIP = ("clip_sample", "clip_sample_range")
THRESHOLD = ("thresholding", "dynamic_thresholding_ratio", "sample_max_value")
CLIPPED = (*CLIP, *THRESHOLD)
ZERO_SNR = ("rescale_betas_zero_snr",)
RANGE = ("sigma_min", "sigma_max", "final_sigmas_type")
DPM = (*SOLVER, "algorithm_type", "final_sigmas_type", "lambda_min_clipped", "variance_type", *THRESHOLD, *FLOW)
CHURN = ("s_churn", "s_tmin", "s_tmax", "s_noise")

Solver = Callable[[str, Config, Config], Solved]


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerClass:
    """One class of diffusers.

    layout: how it lays out its levels. reads: the config keys it reads, any other being ignored as diffusers does.
    step_options: arguments of its `step`. exact_zero: zero terminal SNR is kept at alpha_bar 0. predictions: those
    it has. takes: the explicit levels that its `set_timesteps` has arguments for. clips: the class clips x0 unless its
    config says otherwise. solver: the sampler that its options mean, and the arguments to run it with. spacing: how it
    spaces its steps where its config does not say. sets: config keys that its samplers set. axis: predictions by their
    names on its own axis.
    """

    layout: Callable[[GridRequest], Grid]
    reads: tuple[str, ...]
    solver: Solver | None = None
    spacing: str = "linspace"
    sets: Mapping[str, Any] = field(default_factory=dict)
    axis: Mapping[str, str] = field(default_factory=dict)
    step_options: tuple[str, ...] = ()
    exact_zero: bool = False
    predictions: tuple[str, ...] = PREDICTIONS
    takes: tuple[str, ...] = ()
    clips: bool = False


_DPM_SETS = {"algorithm_type": "dpmsolver++", "solver_type": "midpoint"}
_TWO = ("epsilon", "v_prediction")

CLASSES: dict[str, SchedulerClass] = {
    "EulerDiscreteScheduler": SchedulerClass(
        solver=meanings.churned_late,
        takes=("timesteps", "sigmas"),
        layout=grids.k_family,
        reads=(*SPACED, *RESPACED, *ZERO_SNR, *RANGE, "interpolation_type", "timestep_type"),
        step_options=CHURN,
    ),
    "EulerAncestralDiscreteScheduler": SchedulerClass(
        layout=grids.k_family, reads=(*SPACED, *ZERO_SNR), predictions=_TWO
    ),
    "HeunDiscreteScheduler": SchedulerClass(
        takes=("timesteps",), layout=grids.k_family, reads=(*SPACED, *RESPACED, *CLIP)
    ),
    "KDPM2DiscreteScheduler": SchedulerClass(layout=grids.k_family, reads=(*SPACED, *RESPACED), predictions=_TWO),
    "KDPM2AncestralDiscreteScheduler": SchedulerClass(
        layout=grids.k_family, reads=(*SPACED, *RESPACED), predictions=_TWO
    ),
    "LMSDiscreteScheduler": SchedulerClass(
        solver=meanings.lms, layout=grids.k_family, reads=(*SPACED, *RESPACED), step_options=("order",)
    ),
    "DPMSolverSDEScheduler": SchedulerClass(
        layout=grids.k_family, reads=(*SPACED, *RESPACED), step_options=("s_noise",), predictions=_TWO
    ),
    "DDIMScheduler": SchedulerClass(
        spacing="leading",
        layout=grids.ddim_family,
        reads=(*SPACED, *ZERO_SNR, *CLIPPED, "set_alpha_to_one"),
        step_options=("eta",),
        exact_zero=True,
        clips=True,
    ),
    "DDPMScheduler": SchedulerClass(
        solver=meanings.ddpm,
        spacing="leading",
        takes=("timesteps",),
        layout=grids.ddpm_family,
        reads=(*SPACED, *ZERO_SNR, *CLIPPED, "variance_type"),
        exact_zero=True,
        clips=True,
    ),
    "PNDMScheduler": SchedulerClass(
        solver=meanings.pndm,
        spacing="leading",
        sets={"skip_prk_steps": True},
        layout=grids.pndm_family,
        reads=(*SPACED, "skip_prk_steps", "set_alpha_to_one"),
        predictions=_TWO,
    ),
    "DPMSolverMultistepScheduler": SchedulerClass(
        solver=meanings.multistep,
        sets=_DPM_SETS,
        takes=("timesteps",),
        layout=grids.multistep_family,
        reads=(*SPACED, *RESPACED, *ZERO_SNR, *DPM, "use_lu_lambdas", "euler_at_final"),
    ),
    "DPMSolverSinglestepScheduler": SchedulerClass(
        solver=meanings.singlestep,
        spacing="sgm_uniform",
        sets=_DPM_SETS,
        takes=("timesteps",),
        layout=grids.multistep_family,
        reads=(*RESPACED, *DPM),
    ),
    "DEISMultistepScheduler": SchedulerClass(
        solver=meanings.deis,
        layout=grids.multistep_family,
        reads=(*SPACED, *RESPACED, *SOLVER, *FLOW, "algorithm_type", *THRESHOLD),
    ),
    "UniPCMultistepScheduler": SchedulerClass(
        solver=meanings.unipc,
        sets={"solver_type": "bh2"},
        layout=grids.multistep_family,
        reads=(
            *(*SPACED, *RESPACED, *ZERO_SNR, *SOLVER, *RANGE, *FLOW),
            *("predict_x0", "disable_corrector", "solver_p", *THRESHOLD),
        ),
    ),
    "LCMScheduler": SchedulerClass(
        solver=meanings.lcm,
        spacing="lcm",
        takes=("timesteps",),
        layout=grids.lcm_family,
        reads=(*ZERO_SNR, *CLIPPED, "original_inference_steps", "timestep_scaling"),
        exact_zero=True,
    ),
    "TCDScheduler": SchedulerClass(
        spacing="lcm",
        takes=("timesteps",),
        layout=grids.lcm_family,
        reads=(*ZERO_SNR, "original_inference_steps"),
        step_options=("eta",),
        exact_zero=True,
    ),
    "EDMDPMSolverMultistepScheduler": SchedulerClass(
        solver=meanings.edm_multistep,
        axis=EDM_PREDICTIONS,
        spacing="karras",
        layout=grids.edm_family,
        reads=(
            *RANGE,
            *SOLVER,
            "algorithm_type",
            "euler_at_final",
            *THRESHOLD,
            "sigma_data",
            "sigma_schedule",
            "rho",
        ),
        predictions=_TWO,
    ),
    "EDMEulerScheduler": SchedulerClass(
        solver=meanings.churned_late,
        axis=EDM_PREDICTIONS,
        spacing="karras",
        layout=grids.edm_family,
        reads=(*RANGE, "sigma_data", "sigma_schedule", "rho"),
        step_options=CHURN,
        predictions=_TWO,
    ),
}


PIPELINES_STEP = {"eta": 0.0}
"""What diffusers' pipelines hand to `step`, where it takes that and a call says nothing, whatever its own default."""


def pipelines_step(scheduler_config: Config, options: Config) -> dict[str, Any]:
    """The options of `step` with which diffusers' pipelines run this scheduler, given those that were asked for."""
    kind = CLASSES.get(str(scheduler_config.get("_class_name")))
    taken = {} if kind is None else {k: v for k, v in PIPELINES_STEP.items() if k in kind.step_options}
    return {**taken, **options}


def spaces_anew(name: str) -> bool:
    """Whether `set_timesteps` of a class takes the strength of a picture and spaces all steps by it."""
    return name in CLASSES and CLASSES[name].layout is grids.lcm_family


def solver_of(name: str, config: Config, options: Config) -> Solved:
    """The sampler that a class and its options mean, and the arguments to run it with."""
    solver = CLASSES[name].solver
    return solver(name, config, options) if solver else (meanings.plain(name), dict(options))


@finite_arithmetic
def program_from_diffusers(
    scheduler_config: Mapping[str, Any],
    *,
    steps: int | None = None,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    start: int = 0,
    strength: float = 1.0,
    single: bool = True,
    layout: Callable[[GridRequest], Grid] | None = None,
    **options: Any,
) -> Program:
    """Compile what a diffusers pipeline with this scheduler does: its class, its options, its conventions.

    scheduler_config: the parsed `scheduler_config.json`, `_class_name` included; keys the class does not read are
        ignored, as diffusers ignores them.
    steps, or timesteps or sigmas where diffusers' `set_timesteps` takes them. start: steps skipped (img2img).
    strength: of a picture, by which the steps are spaced where the class's `set_timesteps` takes it (`spaces_anew`).
    single: hold the tables in float32 as diffusers does; False is for telling its rounding apart.
    layout: lays out levels of their own (`held_layout`) instead of the class's.
    options: arguments of the scheduler's `step` (eta, s_churn, ...).

    Raises UnknownNameError, ArgumentError, and UnsupportedError for what rows cannot do.
    """
    check_keys(scheduler_config, Reader(place="the scheduler's configuration", error=ArgumentError))
    name = scheduler_class(str(scheduler_config.get("_class_name", "")))
    if name not in CLASSES:
        if name:
            resolve_sampler(name)
        raise UnknownNameError("scheduler class (_class_name)", name, CLASSES)
    kind = CLASSES[name]
    config = {key: scheduler_config[key] for key in (*COMMON, *kind.reads) if key in scheduler_config}
    config["_class_name"] = name
    if kind.clips:
        config.setdefault("clip_sample", True)
    refuse_options(config, clips=True)
    refuse_options(options)
    for option in options:
        if option not in kind.step_options:
            raise UnknownNameError(f"step option of {name}", option, kind.step_options or ("(none)",))
        check_option(option, options[option])
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in kind.predictions:
        raise UnsupportedError(f"prediction {prediction!r} with {name}", expected=" or ".join(kind.predictions))
    sampler, arguments = solver_of(name, config, options)
    if "single" in signature(sampler.solve).parameters:
        arguments["single"] = single
    rescales = "rescale_betas_zero_snr" in kind.reads
    tables = Tables.of(config, rescales=rescales, floored=not kind.exact_zero, single=single)
    _check_steps(steps, timesteps, sigmas, start, tables.count)
    _check_strength(strength, spaced=spaces_anew(name) and start == 0 and steps is not None)
    request = GridRequest(
        tables=tables,
        steps=steps,
        timesteps=timesteps,
        sigmas=sigmas,
        start=start,
        options=options,
        takes=kind.takes,
        strength=strength,
    )
    grid = (layout or kind.layout)(request)
    first = grid.path.calls[0] if grid.path.calls else grid.path.first
    scale = first.scale if sampler.latent_space == "ve" else 1.0
    init = (0.0, grid.init_noise * scale) if start == 0 else (first.scale, first.noise_scale)
    return assemble(
        sampler,
        grid.path,
        schedule=_schedule_name(kind, config, timesteps, sigmas),
        prediction=kind.axis.get(prediction, prediction),
        init=init,
        options=arguments,
        bound=threshold(config) or _clip_limit(config),
    )


def admits_thresholding(sampler: Sampler) -> bool:
    """Whether x0 may be thresholded: in the samplers whose class in diffusers does so where its config says it."""
    return sampler.diffusers is not None and "thresholding" in CLASSES[sampler.diffusers].reads


def threshold(config: Config) -> Bound | None:
    """The bound that each image has of its own, of a config that says `thresholding`."""
    if not config.get("thresholding"):
        return None
    ratio, most = config.get("dynamic_thresholding_ratio", 0.995), config.get("sample_max_value", 1.0)
    if not 0 <= ratio <= 1:
        raise ArgumentError(f"dynamic_thresholding_ratio={ratio!r}", expected="a number from 0 to 1")
    if not 0 < most < math.inf:
        raise ArgumentError(f"sample_max_value={most!r}", expected="a finite number above 0")
    return Bound(limit=float(most), ratio=float(ratio))


def _clip_limit(config: Config) -> Bound | None:
    """The magnitude to which x0 is clipped, of a config that says so."""
    if not config.get("clip_sample"):
        return None
    limit = config.get("clip_sample_range", 1.0)
    if not 0 < limit < math.inf:
        raise ArgumentError(f"clip_sample_range={limit!r}", expected="a finite number above 0")
    return Bound(limit=float(limit))


def _check_steps(
    steps: int | None, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None, start: int, count: int
) -> None:
    if sum(value is not None for value in (steps, timesteps, sigmas)) != 1:
        raise ArgumentError("steps, timesteps and sigmas", expected="exactly one of them")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= count):
        raise ArgumentError(f"steps={steps!r}", expected=f"an integer from 1 to {count}")
    if isinstance(start, bool) or not isinstance(start, int) or start < 0:
        raise ArgumentError(f"start={start!r}", expected="an integer of at least 0")


def _check_strength(strength: float, *, spaced: bool) -> None:
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 <= strength <= 1:
        raise ArgumentError(f"strength={strength!r}", expected="a number from 0 to 1")
    if strength != 1 and not spaced:
        raise ArgumentError(f"strength={strength!r}", expected="LCM or TCD, and steps of which none is skipped")


def _schedule_name(kind: SchedulerClass, config: Config, timesteps: object, sigmas: object) -> str:
    if timesteps is not None or sigmas is not None:
        return "timesteps" if timesteps is not None else "sigmas"
    return grids.respacing(config) or str(
        config.get("timestep_spacing") or config.get("sigma_schedule") or kind.spacing
    )
