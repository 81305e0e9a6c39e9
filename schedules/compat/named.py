"""diffusers' conventions for a sampler and a schedule by name: its class's config, and what that offers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...errors import UnknownNameError, UnsupportedError
from ..names import resolve_sampler
from ..noise import NoiseSchedule
from ..program import Program
from ..solvers.registry import Sampler, find_sampler
from ..tables import load_table
from .classes import CLASSES, COMMON, SchedulerClass, pipelines_step, program_from_diffusers

_RESPACED_BY = {
    "karras": "use_karras_sigmas",
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",
    "lu": "use_lu_lambdas",
}
_DEFAULT_SPACED = ("leading", "linspace", "trailing")


def compile_compat(
    sampler: Sampler,
    schedule: str | None,
    steps: int | None,
    noise: NoiseSchedule,
    prediction: str | None,
    start: int,
    strength: float,
    timesteps: Sequence[float] | None,
    sigmas: Sequence[float] | None,
    options: Mapping[str, Any],
) -> Program:
    """`compile_program(..., compat="diffusers")`: the checkpoint's config under the sampler's class.

    `options` are config keys of that class and arguments of its `step`.
    """
    config = scheduler_config(sampler, noise)
    kind = CLASSES[config["_class_name"]]
    if prediction is not None:
        config["prediction_type"] = prediction
    step_options = {}
    for key, value in options.items():
        if key in kind.step_options:
            step_options[key] = value
        elif key in (*COMMON, *kind.reads):
            config[key] = value
        elif key != "published":
            accepted = [*kind.step_options, *kind.reads, *COMMON]
            raise UnknownNameError(f"option of {sampler.name} with compat='diffusers'", key, accepted)
    step_options = pipelines_step(config, step_options)
    if schedule is not None:
        steps, timesteps = _apply_schedule(config, kind, schedule, steps, timesteps, sampler)
    return program_from_diffusers(
        config,
        steps=steps,
        timesteps=timesteps,
        sigmas=sigmas,
        start=start,
        strength=strength,
        **step_options,
    )


def scheduler_config(sampler: Sampler, noise: NoiseSchedule) -> dict[str, Any]:
    """The config of a sampler's diffusers class on a checkpoint's noise schedule, `_class_name` included.

    What the checkpoint did not state is left to the class, as diffusers' `from_config` does.

    Raises UnsupportedError for a sampler that diffusers does not have.
    """
    name = sampler.diffusers
    if name is None:
        raise UnsupportedError(f"sampler {sampler.name!r} with compat='diffusers'", remedy="Use compat=None.")
    kind = CLASSES[name]
    unstated = noise.config.get("_use_default_values") or ()
    read = {*COMMON, *kind.reads}.difference(unstated)
    config: dict[str, Any] = {key: value for key, value in noise.config.items() if key in read}
    config.update(_preset_keys(sampler, kind))
    return {**config, "_class_name": name}


def _preset_keys(sampler: Sampler, kind: SchedulerClass) -> dict[str, Any]:
    """A sampler's presets as config keys of its class."""
    keys = dict(kind.sets)
    if "order" in sampler.presets:
        keys["solver_order"] = sampler.presets["order"]
    if sampler.presets.get("sde"):
        keys["algorithm_type"] = f"sde-{keys['algorithm_type']}"
    return keys


def _apply_schedule(
    config: dict[str, Any],
    kind: SchedulerClass,
    schedule: str,
    steps: int | None,
    timesteps: Sequence[float] | None,
    sampler: Sampler,
) -> tuple[int | None, Sequence[float] | None]:
    """Say a schedule in the config keys of the class, or as explicit timesteps for the published ones."""
    for key in _RESPACED_BY.values():
        config.pop(key, None)
    keys = _schedule_keys(kind, schedule)
    if keys is not None:
        config.update(keys)
        return steps, timesteps
    published = _published(schedule, steps)
    if published is not None:
        return None, published
    if schedule.startswith("ays"):
        raise UnsupportedError(
            f"schedule {schedule!r} at {steps} steps with compat='diffusers', which has it at its own length only",
            remedy="Use compat=None, which has it at any step count.",
        )
    offered = [s for s in (*_DEFAULT_SPACED, *_RESPACED_BY) if _RESPACED_BY.get(s, "timestep_spacing") in kind.reads]
    raise UnsupportedError(
        f"schedule {schedule!r} with {sampler.diffusers} in diffusers",
        expected=f"one of {', '.join(offered)}" if offered else "no schedule",
        remedy="Use compat=None, which has every schedule with every sampler.",
    )


def _schedule_keys(kind: SchedulerClass, schedule: str) -> dict[str, Any] | None:
    """A schedule in config keys of a class; `None` for one that the class has no keys for."""
    if schedule in _DEFAULT_SPACED and "timestep_spacing" in kind.reads:
        return {"timestep_spacing": schedule}
    if schedule in _RESPACED_BY and _RESPACED_BY[schedule] in kind.reads:
        return {_RESPACED_BY[schedule]: True}
    if "sigma_schedule" in kind.reads and schedule in ("karras", "exponential"):
        return {"sigma_schedule": schedule}
    return {} if schedule == kind.spacing and "timestep_spacing" not in kind.reads else None


def spacing_keys(sampler: str, schedule: str) -> dict[str, Any]:
    """A schedule in config keys of a sampler's class, for levels that are given; none where the class has none."""
    name = find_sampler(resolve_sampler(sampler).name).diffusers
    keys = None if name is None else _schedule_keys(CLASSES[name], schedule)
    return {} if keys is None or schedule not in _DEFAULT_SPACED else keys


def _published(schedule: str, steps: int | None) -> Sequence[float] | None:
    """The timesteps of a published table at its own number of steps."""
    if not schedule.startswith("ays"):
        return None
    table = load_table(schedule)
    own = table.timesteps is not None and steps == len(table.timesteps) - 1
    return table.timesteps[:-1] if own and table.timesteps is not None else None


def diffusers_has(
    sampler: Sampler, schedule: str | None, steps: int | None, *, explicit: str | None, options: Iterable[str]
) -> bool:
    """Whether diffusers has a class for a sampler, with this schedule, these options and this kind of explicit levels.

    schedule: its canonical name. explicit: `"timesteps"`, `"sigmas"` or `None`.
    """
    if sampler.diffusers is None:
        return False
    kind = CLASSES[sampler.diffusers]
    published = "timesteps" in kind.takes and _published(schedule or "", steps) is not None
    if schedule is not None and _schedule_keys(kind, schedule) is None and not published:
        return False
    if explicit is not None and explicit not in kind.takes:
        return False
    return set(options) <= {*COMMON, *kind.reads, *kind.step_options}
