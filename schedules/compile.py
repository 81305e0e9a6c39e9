"""The clean road: a sampler under a schedule, in fewstep's own conventions.

Each step ends where the next begins, the last one at sigma 0 unless another end is asked for, history starts anew
where steps are skipped, the start is unit noise in the network's own scaling, and everything is float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import ArgumentError, UnknownNameError, UnsupportedError
from ..values import Reader
from .assemble import assemble
from .axis import Axis, edm_axis, edm_prediction, own_axis
from .clip import Bound
from .compat.classes import THRESHOLD, admits_thresholding, threshold
from .compat.named import compile_compat
from .keys import check_keys
from .levels import Level, Path
from .names import SEARCHED, resolve_sampler, resolve_schedule
from .noise import PREDICTIONS, NoiseSchedule
from .options import check_option, check_spacing_option
from .program import Program
from .refusals import finite_arithmetic, refuse_options
from .solvers.registry import SAMPLERS, Sampler, find_sampler
from .spacing import FIRST, SPACINGS, Spacing, from_table

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
    fed: Sequence[float] | None = None,
    **options: Any,
) -> Program:
    """Compile `sampler` under `schedule` to a program of `steps` steps.

    sampler, schedule: any alias; an A1111 name such as "DPM++ 2M Karras" carries its schedule.
    prediction: what the network returns, the noise schedule's own if None.
    start: steps to skip (img2img).
    strength: of a picture, by which LCM's and TCD's steps are spaced anew, with `compat="diffusers"` alone.
    compat: None, or "diffusers" for diffusers' own conventions, quirks included.
    timesteps, sigmas: explicit levels instead of a schedule; `sigmas` includes the one where sampling ends.
    fed: beside `sigmas`, the timestep that the network is fed at each but the last, where that is not the sigma's own.
    options: of the sampler (eta, s_churn, solver_type, ...), thresholding, dynamic_thresholding_ratio and
        sample_max_value (the checkpoint's if not given), of the spacing (rho, sigma_min, steps_offset, ...; of one that
        can begin lower, first_timestep or first_sigma, from that level's noise alone), and
        last_sigma: "zero", "sigma_min", a number, or "own" for the last entry of the list or table itself.

    Raises UnknownNameError, ArgumentError and UnsupportedError.
    """
    spelling = resolve_sampler(sampler)
    chosen = find_sampler(spelling.name)
    schedule = resolve_schedule(schedule) if schedule is not None else None
    if schedule == SEARCHED:
        raise ArgumentError(
            f"schedule {SEARCHED!r}, which no sampler has by itself",
            expected="that of a bundle, or a file of found schedules",
            remedy="Name it where a bundle is run; fewstep.load_schedules(FILE).program(...) compiles a file's.",
        )
    if schedule and spelling.schedule and schedule != spelling.schedule:
        raise ArgumentError(
            f"sampler {sampler!r} carries the schedule {spelling.schedule!r}, but schedule={schedule!r} was asked for",
            remedy=f"Use sampler={chosen.name!r} with schedule={schedule!r}.",
        )
    schedule = schedule or spelling.schedule
    refuse_options(options, clips=compat == "diffusers")
    if fed is not None and (sigmas is None or compat is not None or len(fed) != len(sigmas) - 1):
        raise ArgumentError(
            f"{len(fed)} timesteps to feed", expected="beside sigmas, one for each but the last, without compat"
        )
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
    bound, options = _thresholding(chosen, noise, options)
    solver_options, layout = split_options(chosen, {**_learned(chosen, noise), **spelling.options, **options})
    axis = edm_axis(layout) if chosen.name == "edm_euler" else own_axis(noise, chosen)
    lower = not layout.keys().isdisjoint(FIRST)
    if timesteps is None and sigmas is None:
        schedule = schedule or _own_schedule(chosen, noise)
        levels = _spaced(SPACINGS[schedule], axis, int(steps or 0), layout)
    else:
        schedule = "timesteps" if timesteps is not None else "sigmas"
        levels = _explicit(axis, timesteps, sigmas, layout)
        if fed is not None:
            levels = [*(_fed(level, t, axis) for level, t in zip(levels, fed, strict=False)), levels[-1]]
    if layout:
        named = SPACINGS[schedule].options if schedule in SPACINGS else ()
        accepted = sorted({*chosen.options, *named, "last_sigma"})
        raise UnknownNameError(f"option of {chosen.name} under {schedule}", next(iter(layout)), accepted)
    kind = prediction or noise.prediction
    if chosen.name == "edm_euler":
        kind = edm_prediction(kind)
    return assemble(
        chosen,
        _path(levels, axis, start),
        schedule=schedule,
        prediction=kind,
        init=(levels[start].scale if start else 0.0, levels[start].noise_scale if start or lower else 1.0),
        options=solver_options,
        bound=bound,
    )


def _thresholding(
    sampler: Sampler, noise: NoiseSchedule, options: Mapping[str, Any]
) -> tuple[Bound | None, dict[str, Any]]:
    """The bound that each image's x0 has, as the options or else the checkpoint say it, and the other options.

    Raises `UnsupportedError` for a sampler that does not threshold.
    """
    asked = {k: options.get(k, noise.config.get(k)) for k in THRESHOLD}
    check_keys({k: v for k, v in asked.items() if v is not None}, Reader(place="an option", error=ArgumentError))
    bound = threshold({k: v for k, v in asked.items() if v is not None})
    if bound is not None and not admits_thresholding(sampler):
        source = "it was asked for" if options.get("thresholding") else "the checkpoint's scheduler says it"
        raise UnsupportedError(
            f"sampler {sampler.name!r} with thresholding ({source})",
            expected=f"one of {', '.join(s.name for s in SAMPLERS.values() if admits_thresholding(s))}",
            remedy="Choose one of these, or switch it off: thresholding=False.",
        )
    return bound, {k: v for k, v in options.items() if k not in THRESHOLD}


def _learned(sampler: Sampler, noise: NoiseSchedule) -> dict[str, Any]:
    """A checkpoint whose network says its variance has it used, unless an option says otherwise."""
    learned = noise.config.get("variance_type") == "learned_range" and "learned_variance" in sampler.options
    return {"learned_variance": True} if learned else {}


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


def _own_schedule(sampler: Sampler, noise: NoiseSchedule) -> str:
    """The sampler's own schedule, or where it picks training timesteps of a network that has none, Karras'."""
    without = noise.timestep_type == "continuous" and SPACINGS[sampler.schedule].timesteps is not None
    return "karras" if without else sampler.schedule


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
    continuous = axis.noise.timestep_type == "continuous" and spacing.timesteps is not None
    if continuous or (axis.edm_std is not None and spacing.sigmas is None):
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
        first = _beginning(axis, own)
        count = len(axis.noise) if first is None else axis.training_timestep(first.sigma) + 1
        if steps > count:
            raise ArgumentError(f"steps={steps} from timestep {count - 1:g}", expected=f"at most {int(count)}")
        levels = [axis.at_timestep(float(t)) for t in spacing.timesteps(count, steps, **own)]
        return _ended([first or levels[0], *levels[1:]], last, axis)
    if spacing.table is not None:
        sigmas = [float(sigma) for sigma in from_table(spacing.table, steps)]
        _check_top(sigmas[0], axis, spacing.name)
        levels = [axis.at_sigma(sigma) for sigma in sigmas[:-1]]
        return [*levels, Level(0.0, sigmas[-1])] if last == "own" else _ended(levels, last, axis)
    first = _beginning(axis, own)
    if first is not None:
        if "sigma_max" in own:
            raise ArgumentError(
                f"sigma_max={own['sigma_max']} beside the level where sampling begins", remedy="Pass one of them."
            )
        own["sigma_max"] = first.sigma if math.isfinite(first.sigma) else axis.sigma_max
    low, high = float(own.pop("sigma_min", axis.sigma_min)), float(own.pop("sigma_max", axis.sigma_max))
    if not 0 < low < high:
        raise ArgumentError(f"sigma_min={low} and sigma_max={high}", expected="0 < sigma_min < sigma_max")
    _check_top(high, axis, spacing.name)
    if spacing.sigmas is None:
        raise ArgumentError(f"schedule {spacing.name!r} has no levels")
    return _ended([axis.at_sigma(float(sigma)) for sigma in spacing.sigmas(low, high, steps, **own)], last, axis)


def _beginning(axis: Axis, own: dict[str, Any]) -> Level | None:
    """The level that `first_timestep` or `first_sigma` names, which are taken out of `own`."""
    asked = {name: float(own.pop(name)) for name in FIRST if name in own}
    if len(asked) > 1:
        raise ArgumentError(f"both {' and '.join(FIRST)}", remedy="Pass one of them.")
    if "first_sigma" in asked:
        _check_top(asked["first_sigma"], axis, "sampling")
        return axis.at_sigma(asked["first_sigma"])
    if not asked:
        return None
    if axis.edm_std is not None or axis.noise.timestep_type == "continuous":
        raise ArgumentError("first_timestep for a network fed with ln(sigma) / 4", remedy="Pass first_sigma=....")
    if asked["first_timestep"] > len(axis.noise) - 1:
        raise ArgumentError(f"first_timestep={asked['first_timestep']:g}", expected=f"at most {len(axis.noise) - 1}")
    return axis.at_timestep(asked["first_timestep"])


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


def _fed(level: Level, timestep: float, axis: Axis) -> Level:
    """The level with another timestep for the network."""
    most = math.inf if axis.noise.timestep_type == "continuous" else len(axis.noise) - 1
    if not math.isfinite(timestep) or not (timestep <= most and (timestep >= 0 or most == math.inf)):
        raise ArgumentError(f"timestep {timestep:g} to feed", expected=f"a number from 0 to {most:g}")
    return replace(level, t=float(timestep))


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
        trained=len(axis.noise),
    )
