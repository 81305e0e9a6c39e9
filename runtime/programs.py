"""The program of a request, by the checkpoint's own scheduler or by name; compiled once, and kept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from ..bundle import Bundle
from ..errors import UnknownNameError
from ..schedules import NoiseSchedule, Program, compile_program, program_from_diffusers
from ..schedules.compat.classes import CLASSES, pipelines_step
from ..schedules.names import resolve_schedule, scheduler_class

MOST_KEPT = 256


def choose_program(
    bundle: Bundle,
    *,
    sampler: str | None,
    schedule: str | None,
    steps: int,
    start: int = 0,
    compat: str | None = None,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    options: Mapping[str, Any],
) -> Program:
    """The program of a request; without a sampler, the checkpoint's own scheduler, in diffusers' conventions."""
    own = bundle.defaults
    scheduler = bundle.noise_config
    if timesteps is None and sigmas is None and own.timesteps is not None:
        asked = (sampler, schedule, steps)
        timesteps = own.timesteps if asked == (own.sampler, own.schedule, len(own.timesteps)) else None
    if own.options and sampler == own.sampler:
        options = {**own.options, **options}
    explicit = timesteps is not None or sigmas is not None
    shared = {"steps": None if explicit else steps, "start": start, "timesteps": timesteps, "sigmas": sigmas}
    if schedule is not None and resolve_schedule(schedule) == resolve_schedule("ays"):
        schedule = bundle.model.schedule
    if compat not in (None, "diffusers"):
        raise UnknownNameError("compat", str(compat), ("diffusers",))
    if sampler is None and schedule is None and set(options) <= set(step_options(scheduler)):
        return _kept(scheduler, {**shared, **pipelines_step(scheduler, options)})
    sampler = str(bundle.scheduler["_class_name"]) if sampler is None else sampler
    return _kept(scheduler, {"sampler": sampler, "schedule": schedule, "compat": compat, **shared, **options})


def _kept(scheduler: Mapping[str, Any], asked: Mapping[str, Any]) -> Program:
    """The program, compiled once for all requests that ask for the same; what is no plain data is compiled anew."""
    try:
        text = json.dumps([scheduler, asked], default=_plain)
    except TypeError:
        return _compile(scheduler, asked)
    return _compiled(text)


@lru_cache(maxsize=MOST_KEPT)
def _compiled(text: str) -> Program:
    return _compile(*json.loads(text))


def _compile(scheduler: Mapping[str, Any], asked: Mapping[str, Any]) -> Program:
    """With a sampler in fewstep's conventions, without one as diffusers runs the checkpoint's own scheduler."""
    if "sampler" in asked:
        return compile_program(noise=NoiseSchedule.from_diffusers(scheduler), **asked)
    return program_from_diffusers(scheduler, **asked)


def _plain(value: Any) -> Any:
    """NumPy's and torch's arrays and numbers as lists and numbers."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"no plain data: {type(value).__name__}")


def step_options(scheduler: Mapping[str, Any]) -> tuple[str, ...]:
    """The options that a diffusers scheduler's `step` takes."""
    known = CLASSES.get(scheduler_class(str(scheduler.get("_class_name"))))
    return () if known is None else known.step_options
