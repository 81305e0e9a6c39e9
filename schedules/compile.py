"""The clean road: a sampler under a schedule, in fewstep's own conventions.

Each step ends where the next begins, the last one at sigma 0 unless another end is asked for, history starts anew
where steps are skipped, the start is unit noise in the network's own scaling, and everything is float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ArgumentError, UnknownNameError
from .assemble import assemble
from .compat.named import compile_compat
from .levels import EDM_PREDICTIONS, Level, Path
from .names import resolve_sampler, resolve_schedule
from .noise import PREDICTIONS, NoiseSchedule
from .options import check_option, check_spacing_option
from .program import Program
from .refusals import finite_arithmetic, refuse_options
from .solvers.registry import Sampler, find_sampler
from .spacing import SPACINGS, Spacing, from_table, sigma_range

LAST_SIGMAS = ("zero", "sigma_min", "own")


@finite_arithmetic
def compile_program(
    sampler: str,
    *,
    schedule: str | None = None,
    steps: int | None = None,
    noise: NoiseSchedule,
    prediction: str | None = None,
    start: int = 0,
    strength: float = 1.0,
    compat: str | None = None,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    **options: Any,
) -> Program:
    """Compile `sampler` under `schedule` to a program of `steps` steps.

    sampler, schedule: any alias; an A1111 name such as "DPM++ 2M Karras" carries its schedule.
    prediction: what the network returns, the noise schedule's own if None.
    start: steps to skip (img2img).
    strength: of a picture, by which LCM's and TCD's steps are spaced anew, with `compat="diffusers"` alone.
    compat: None, or "diffusers" for diffusers' own conventions, quirks included.
    timesteps, sigmas: explicit levels instead of a schedule; `sigmas` includes the one where sampling ends.
    options: of the sampler (eta, s_churn, solver_type, ...), of the spacing (rho, sigma_min, steps_offset, ...), and
        last_sigma: "zero", "sigma_min", a number, or "own" for the last entry of the list or table itself.

    Raises UnknownNameError, ArgumentError and UnsupportedError.
    """
    spelling = resolve_sampler(sampler)
    chosen = find_sampler(spelling.name)
    schedule = resolve_schedule(schedule) if schedule is not None else None
    if schedule and spelling.schedule and schedule != spelling.schedule:
        raise ArgumentError(
            f"sampler {sampler!r} carries the schedule {spelling.schedule!r}, but schedule={schedule!r} was asked for",
            remedy=f"Use sampler={chosen.name!r} with schedule={schedule!r}.",
        )
    schedule = schedule or spelling.schedule
    refuse_options(options, clips=compat == "diffusers")
    check_counts(steps, start, timesteps, sigmas, schedule, noise)
    if prediction is not None and prediction not in PREDICTIONS:
        raise UnknownNameError("prediction", prediction, PREDICTIONS)
    if compat == "diffusers":
        return compile_compat(
            chosen,
            schedule,
            steps,
            noise,
            prediction,
            start,
            strength,
            timesteps,
            sigmas,
            {**spelling.options, **options},
        )
    if compat is not None:
        raise UnknownNameError("compat", compat, ("diffusers",))
    if strength != 1.0:
        raise ArgumentError(f"strength={strength!r}", expected="compat='diffusers', or start: the steps to skip")
    solver_options, layout = split_options(chosen, {**spelling.options, **options})
    axis = _edm_axis(layout) if chosen.name == "edm_euler" else _axis(noise, chosen)
    if timesteps is None and sigmas is None:
        schedule = schedule or chosen.schedule
        levels = _spaced(SPACINGS[schedule], axis, int(steps or 0), layout)
    else:
        schedule = "timesteps" if timesteps is not None else "sigmas"
        levels = _explicit(axis, timesteps, sigmas, layout)
    if layout:
        named = SPACINGS[schedule].options if schedule in SPACINGS else ()
        accepted = sorted({*chosen.options, *named, "last_sigma"})
        raise UnknownNameError(f"option of {chosen.name} under {schedule}", next(iter(layout)), accepted)
    kind = prediction or noise.prediction
    if chosen.name == "edm_euler":
        kind = _edm_prediction(kind)
    return assemble(
        chosen,
        _path(levels, axis, start),
        schedule=schedule,
        prediction=kind,
        init=(0.0, 1.0) if start == 0 else (levels[start].scale, levels[start].noise_scale),
        options=solver_options,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """The noise axis of one network: the range it was trained on, and both directions between t and sigma."""

    noise: NoiseSchedule
    sigma_min: float
    sigma_max: float
    edm_std: float | None
    infinite_top: bool

    def at_sigma(self, sigma: float) -> Level:
        if self.edm_std is not None:
            return Level(0.25 * math.log(max(sigma, 1e-10)), sigma, self.edm_std)
        return Level(float(self.noise.timestep_at(sigma)), sigma)

    def at_timestep(self, t: float) -> Level:
        if self.infinite_top and t == len(self.noise) - 1:
            return Level(float(t), math.inf)
        sigma = float(self.noise.sigma_at(t))
        if self.noise.timestep_type == "continuous":
            return self.at_sigma(sigma)
        return Level(float(t), sigma)


def _axis(noise: NoiseSchedule, sampler: Sampler) -> Axis:
    low, high = sigma_range(noise)
    infinite = noise.zero_terminal_snr and sampler.infinite_top
    return Axis(noise=noise, sigma_min=low, sigma_max=high, edm_std=None, infinite_top=infinite)


def _edm_axis(layout: dict[str, Any]) -> Axis:
    """EDM networks have no training timesteps: sigma ranges over [0.002, 80] unless told otherwise."""
    for name in ("sigma_min", "sigma_max", "sigma_data"):
        check_spacing_option(name, layout.get(name, 1.0))
    low, high = float(layout.get("sigma_min", 0.002)), float(layout.get("sigma_max", 80.0))
    std = float(layout.pop("sigma_data", 0.5))
    return Axis(noise=NoiseSchedule.scaled_linear(), sigma_min=low, sigma_max=high, edm_std=std, infinite_top=False)


def _edm_prediction(prediction: str) -> str:
    if prediction not in EDM_PREDICTIONS:
        raise ArgumentError(f"edm_euler with prediction {prediction!r}", expected=" or ".join(EDM_PREDICTIONS))
    return EDM_PREDICTIONS[prediction]


def check_counts(
    steps: int | None,
    start: int,
    timesteps: Sequence[float] | None,
    sigmas: Sequence[float] | None,
    schedule: str | None,
    noise: NoiseSchedule,
) -> None:
    """Refuse counts that cannot be, and levels asked for in two ways at once."""
    if timesteps is not None and sigmas is not None:
        raise ArgumentError("both timesteps and sigmas were given", remedy="Pass one of them.")
    explicit = timesteps if timesteps is not None else sigmas
    if explicit is not None and schedule is not None:
        name = "timesteps" if timesteps is not None else "sigmas"
        raise ArgumentError(f"schedule={schedule!r} beside explicit {name}", remedy=f"Drop schedule or {name}.")
    if explicit is None and steps is None:
        raise ArgumentError("no number of steps", remedy="Pass steps=..., timesteps=... or sigmas=....")
    if explicit is not None:
        if len(explicit) == 0:
            raise ArgumentError("an empty list of levels", expected="at least one")
        if steps is not None:
            raise ArgumentError(
                f"steps={steps} beside an explicit list of levels", remedy="Drop steps: the list has its own length."
            )
    for name, value, least in (("steps", steps, 1), ("start", start, 0)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise ArgumentError(f"{name}={value!r}", expected=f"an integer of at least {least}")
    if steps is not None and steps > len(noise):
        raise ArgumentError(
            f"steps={steps} is more than the {len(noise)} training timesteps", expected=f"at most {len(noise)}"
        )


def split_options(sampler: Sampler, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The sampler's own options, checked, and the rest, which belong to the spacing."""
    own = {name: value for name, value in options.items() if name in sampler.options}
    for name, value in own.items():
        check_option(name, value, sampler.options[name])
    return own, {name: value for name, value in options.items() if name not in own}


def _spaced(spacing: Spacing, axis: Axis, steps: int, layout: dict[str, Any]) -> list[Level]:
    """The n + 1 levels of a named spacing; takes its options out of `layout`."""
    own = {name: layout.pop(name) for name in spacing.options if name in layout}
    for name, value in own.items():
        check_spacing_option(name, value)
    last = layout.pop("last_sigma", "zero")
    if axis.edm_std is not None and spacing.sigmas is None:
        raise ArgumentError(
            f"schedule {spacing.name!r} picks training timesteps, which an EDM network does not have",
            remedy="Use schedule='karras' or 'exponential', or sigmas=....",
        )
    if spacing.most_steps is not None and steps > spacing.most_steps:
        raise ArgumentError(
            f"steps={steps} under the {spacing.name} spacing",
            expected=f"at most {spacing.most_steps}",
            remedy="Use fewer steps, or schedule='trailing'.",
        )
    if spacing.timesteps is not None:
        if spacing.name == "lcm" and steps > int(own.get("original_steps", 50)):
            raise ArgumentError(
                f"steps={steps} under the lcm spacing",
                expected=f"at most its {own.get('original_steps', 50)} steps",
                remedy="Use fewer steps, original_steps=..., or schedule='trailing'.",
            )
        levels = [axis.at_timestep(float(t)) for t in spacing.timesteps(len(axis.noise), steps, **own)]
        return _ended(levels, last, axis)
    if spacing.table is not None:
        sigmas = [float(sigma) for sigma in from_table(spacing.table, steps)]
        _check_top(sigmas[0], axis, spacing.name)
        levels = [axis.at_sigma(sigma) for sigma in sigmas[:-1]]
        return [*levels, Level(0.0, sigmas[-1])] if last == "own" else _ended(levels, last, axis)
    low, high = float(own.pop("sigma_min", axis.sigma_min)), float(own.pop("sigma_max", axis.sigma_max))
    if not 0 < low < high:
        raise ArgumentError(f"sigma_min={low} and sigma_max={high}", expected="0 < sigma_min < sigma_max")
    _check_top(high, axis, spacing.name)
    if spacing.sigmas is None:
        raise ArgumentError(f"schedule {spacing.name!r} has no levels")
    return _ended([axis.at_sigma(float(sigma)) for sigma in spacing.sigmas(low, high, steps, **own)], last, axis)


def _explicit(
    axis: Axis, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None, layout: dict[str, Any]
) -> list[Level]:
    """The levels of an explicit list. Timesteps end at sigma 0, sigmas at their own last, unless told otherwise."""
    name = "timesteps" if timesteps is not None else "sigmas"
    try:
        values = [float(v) for v in (timesteps if timesteps is not None else sigmas or ())]
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"{name} {timesteps if timesteps is not None else sigmas}", expected="numbers") from error
    last = layout.pop("last_sigma", "zero" if timesteps is not None else "own")
    if any(not math.isfinite(v) or v < 0 for v in values) or any(b >= a for a, b in itertools.pairwise(values)):
        raise ArgumentError(f"{name} {values}", expected="finite numbers, falling, none below 0")
    if last == "own" and len(values) < 2:
        raise ArgumentError(f"{name} of one entry that is also where sampling ends", expected="at least two")
    if timesteps is not None:
        if axis.edm_std is not None or axis.noise.timestep_type == "continuous":
            raise ArgumentError("explicit timesteps for a network fed with ln(sigma) / 4", remedy="Pass sigmas=....")
        if values[0] > len(axis.noise) - 1:
            raise ArgumentError(f"timestep {values[0]:g}", expected=f"at most {len(axis.noise) - 1}")
        levels = [axis.at_timestep(t) for t in values]
    else:
        _check_top(values[0], axis, name)
        levels = [axis.at_sigma(sigma) for sigma in values]
    if last == "own":
        return [*levels[:-1], Level(levels[-1].t, levels[-1].sigma)]
    if levels[-1].sigma == 0.0:
        raise ArgumentError(f"{name} that end at 0, which the network cannot be called at", remedy="last_sigma='own'")
    return _ended(levels, last, axis)


def _ended(levels: list[Level], last: str | float, axis: Axis) -> list[Level]:
    """The levels with the one where sampling ends."""
    if isinstance(last, str):
        if last == "own":
            raise ArgumentError(
                "last_sigma='own' with a spacing that has no end of its own",
                remedy="Use 'zero', 'sigma_min' or a number; 'own' is for tables and explicit lists.",
            )
        if last not in LAST_SIGMAS:
            raise UnknownNameError("last_sigma", last, LAST_SIGMAS)
        last = 0.0 if last == "zero" else axis.sigma_min
    if isinstance(last, bool) or not isinstance(last, int | float):
        raise ArgumentError(f"last_sigma={last!r}", expected=f"a number, or one of {', '.join(LAST_SIGMAS)}")
    if not 0.0 <= last <= levels[-1].sigma:
        raise ArgumentError(
            f"last_sigma={last}", expected=f"from 0 to the last evaluation's sigma, {levels[-1].sigma:g}"
        )
    return [*levels, Level(0.0, float(last))]


def _check_top(sigma: float, axis: Axis, name: str) -> None:
    if axis.edm_std is None and axis.noise.timestep_type == "discrete" and sigma > 1.01 * axis.sigma_max:
        raise ArgumentError(
            f"{name} starts at sigma {sigma:g}, above the {axis.sigma_max:g} that this checkpoint was trained to",
            remedy="Use a schedule made for this noise schedule (see: fewstep samplers).",
        )


def _path(levels: Sequence[Level], axis: Axis, start: int) -> Path:
    total = len(levels) - 1
    if start >= total:
        raise ArgumentError(
            f"start={start} leaves none of the {total} steps",
            expected=f"at most {total - 1}",
            remedy="Use a higher strength or more steps.",
        )
    top = max(axis.sigma_max, levels[0].sigma)
    pairs = list(itertools.pairwise(levels))
    return Path(
        pairs=pairs[start:],
        skipped=start,
        total=total,
        before=levels[:start],
        at_sigma=lambda sigma: axis.at_sigma(min(sigma, top)),
        at_timestep=axis.at_timestep,
    )
