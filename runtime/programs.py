"""The program of a request, by the checkpoint's own scheduler or by name; compiled once, and kept."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from ..bundle import Bundle, Defaults
from ..errors import ArgumentError, UnknownNameError
from ..schedules import FoundSchedules, NoiseSchedule, Program, compile_program, program_from_diffusers
from ..schedules.compat.classes import CLASSES, pipelines_step, spaces_anew
from ..schedules.compat.named import diffusers_has, spacing_keys
from ..schedules.names import SEARCHED, Resolved, resolve_sampler, resolve_schedule, scheduler_class
from ..schedules.solvers.registry import find_sampler
from ..schedules.spacing import SPACINGS
from .searched import Named, check_found, find_schedules, found_program

MOST_KEPT = 256
MOST_STEPS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """How a request is sampled once the bundle's own is known: whose conventions, and which levels if they are given.

    as_library: as diffusers runs the checkpoint's own scheduler, whose class `sampler` then is. found: schedules that
    were found for the model, of which it is one.
    """

    sampler: str
    schedule: str | None
    compat: str | None
    timesteps: Sequence[float] | None
    sigmas: Sequence[float] | None
    options: Mapping[str, Any]
    as_library: bool
    found: FoundSchedules | None = None

    @property
    def explicit(self) -> bool:
        return self.timesteps is not None or self.sigmas is not None

    @property
    def spaces_anew(self) -> bool:
        """Whether diffusers' class of it runs, and can space all its steps by the strength of a picture."""
        if self.explicit or self.found is not None or not (self.as_library or self.compat == "diffusers"):
            return False
        return spaces_anew(find_sampler(resolve_sampler(self.sampler).name).diffusers or "")


def choose_program(
    bundle: Bundle, *, steps: int, strength: float | None = None, respaces: bool = False, **asked: Any
) -> Program:
    """The program of a request; asked: see `choose_sampling`. strength: of the picture that it starts from, if it does.

    A picture leaves out the first steps; with `respaces` diffusers' classes that know how space all of them anew by its
    strength.
    """
    chosen = choose_sampling(bundle, steps=steps, **asked)
    scheduler, options = bundle.noise_config, chosen.options
    if chosen.found is not None:
        start = 0 if strength is None else start_step(steps, strength)
        return found_program(json.dumps(scheduler, default=_plain), chosen.found, steps=steps, start=start)
    shared: dict[str, Any] = {
        "steps": None if chosen.explicit else steps,
        "timesteps": chosen.timesteps,
        "sigmas": chosen.sigmas,
    }
    if strength is not None:
        anew = respaces and chosen.spaces_anew
        shared |= {"strength": strength} if anew else {"start": start_step(steps, strength)}
    if chosen.as_library:
        return _kept(scheduler, {**shared, **pipelines_step(scheduler, options)})
    named = {k: getattr(chosen, k) for k in ("sampler", "schedule", "compat")}
    return _kept(scheduler, {**named, **shared, **options})


def asked_or_own(
    bundle: Bundle,
    sampler: str | None,
    schedule: Named | None,
    *,
    explicit: bool = False,
    digest: str | None = None,
) -> tuple[str | None, str | FoundSchedules | None]:
    """Sampler and schedule of a request, from what it asks for and the bundle's defaults; found schedules as such.

    Found ones bring their sampler, whatever the bundle's is. explicit: whether the request states its levels. digest:
    as in `find_schedules`.
    """
    own = bundle.defaults
    if sampler is None and schedule is None and not explicit:
        schedule = own.schedule
    found = find_schedules(bundle, sampler, schedule, digest)
    if found is not None:
        return (found.sampler if sampler is None else sampler), found
    return (own.sampler if sampler is None else sampler), (None if schedule is None else str(schedule))


def usual_steps(bundle: Bundle, schedule: str | FoundSchedules | None) -> int:
    """The steps of a request that asks for none: the bundle's, or the nearest to them that were searched."""
    steps = bundle.defaults.steps
    return schedule.nearest(steps) if isinstance(schedule, FoundSchedules) else steps


def choose_sampling(
    bundle: Bundle,
    *,
    sampler: str | None,
    schedule: Named | None,
    steps: int,
    compat: str | None = None,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    options: Mapping[str, Any],
) -> Sampled:
    """How a request is sampled.

    Without a sampler, the checkpoint's own scheduler as diffusers runs it. The bundle's own sampler under its own
    schedule runs as diffusers runs its class on that checkpoint, wherever that library has what is asked for; any other
    runs in fewstep's conventions, unless `compat` asks for diffusers'. Schedules that were found for it are run as they
    were found.
    """
    own = bundle.defaults
    if compat not in (None, "diffusers"):
        raise UnknownNameError("compat", str(compat), ("diffusers",))
    found = find_schedules(bundle, sampler, schedule)
    if found is not None:
        check_found(bundle, found, sampler=sampler, options=options, compat=compat, timesteps=timesteps, sigmas=sigmas)
        return Sampled(
            sampler=found.sampler,
            schedule=SEARCHED,
            compat=None,
            timesteps=None,
            sigmas=None,
            options={},
            as_library=False,
            found=found,
        )
    schedule = None if schedule is None else str(schedule)
    given = "timesteps" if timesteps is not None else "sigmas" if sigmas is not None else None
    if schedule is not None and resolve_schedule(schedule) == resolve_schedule("ays"):
        schedule = bundle.model.schedule
    is_own = _is_own(own, sampler, schedule, explicit=given is not None)
    if own.options and sampler == own.sampler:
        options = {**_own_options(own, spaced=is_own and given is None), **options}
    if is_own and given is None and own.timesteps is not None and steps == len(own.timesteps):
        timesteps = own.timesteps
    if is_own and compat is None and _as_diffusers(own, steps, given, options):
        compat, spaced = "diffusers", _schedule(own.schedule, resolve_sampler(str(own.sampler)))
        if given is not None:
            options = {**spacing_keys(str(own.sampler), spaced), **options}
        elif timesteps is None:
            schedule = spaced
    as_library = sampler is None and schedule is None and set(options) <= set(step_options(bundle.noise_config))
    return Sampled(
        sampler=str(bundle.scheduler["_class_name"]) if sampler is None else sampler,
        schedule=schedule,
        compat=compat,
        timesteps=timesteps,
        sigmas=sigmas,
        options=options,
        as_library=as_library,
    )


def shortest_call(bundle: Bundle, size: tuple[int, int], *, image: bool) -> dict[str, Any]:
    """The arguments of a call of one evaluation, for warming up; image: starts from a picture, if the model can."""
    told = bundle.model.pictures == "told"
    picture = np.full((size[1], size[0], 3), 128, np.uint8) if image or told else None
    sampler = "dpmpp_1m" if bundle.noise_config.get("thresholding") else "euler"
    call = {"steps": 1, "sampler": sampler, "schedule": "trailing", "size": size, "image": picture}
    return call if picture is None or told else {**call, "strength": 1.0}


def start_step(steps: int, strength: float) -> int:
    """How many steps an image-to-image request leaves out; `ArgumentError` when none would remain."""
    kept = min(int(steps * strength), steps)
    if kept < 1:
        raise ArgumentError(
            f"strength {strength:g} of {steps} steps leaves no step",
            expected="steps x strength of at least 1",
            remedy=f"Use steps={math.ceil(1 / strength)}, or strength={1 / steps:.3g}."
            if strength * MOST_STEPS >= 1
            else f"Use a strength of at least {1 / steps:.3g}.",
        )
    return steps - kept


def _is_own(own: Defaults, sampler: str | None, schedule: str | None, *, explicit: bool) -> bool:
    """Whether this is the sampler that the bundle states, under the schedule that it states with it."""
    if own.sampler is None or sampler is None:
        return False
    asked, stated = resolve_sampler(sampler), resolve_sampler(own.sampler)
    if explicit and schedule is None:
        return asked == stated
    return asked == stated and _schedule(schedule, asked) == _schedule(own.schedule, stated)


def _schedule(name: str | None, sampler: Resolved) -> str:
    """The schedule of a name, or the sampler's own."""
    return resolve_schedule(name) if name is not None else sampler.schedule or find_sampler(sampler.name).schedule


def _own_options(own: Defaults, *, spaced: bool) -> dict[str, float]:
    """The bundle's options of its sampler; with `spaced`, of its schedule too."""
    spacing = SPACINGS.get(_schedule(own.schedule, resolve_sampler(str(own.sampler))))
    of_schedule = () if spacing is None else spacing.options
    return {k: v for k, v in own.options.items() if spaced or k not in of_schedule}


def _as_diffusers(own: Defaults, steps: int, explicit: str | None, options: Mapping[str, Any]) -> bool:
    """Whether diffusers has the bundle's own sampler with what a request asks of it beside that."""
    stated = resolve_sampler(str(own.sampler))
    names = [n for n in (*stated.options, *options) if n != "published"]
    return diffusers_has(
        find_sampler(stated.name), _schedule(own.schedule, stated), steps, explicit=explicit, options=names
    )


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
