"""A request: everything a caller asked for, checked before anything is computed."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..bundle import Bundle
from ..errors import ArgumentError
from ..schedules import NoiseSchedule, Program, compile_program, program_from_diffusers
from ..schedules.names import resolve_schedule
from .seeds import check_seed
from .text import check_prompt

MOST_IMAGES = 1024
LARGEST_SIDE = 16_384
MOST_STEPS = 1000
RESERVED = {"steps", "start", "noise", "prediction", "schedule", "sampler", "compat"}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """One call, one entry an image: prompts, negatives (`None`: none given) and seeds.

    `shared_stream` draws all noise from the first seed's generator, as diffusers does for one generator.
    """

    prompts: tuple[str, ...]
    negatives: tuple[str | None, ...]
    seeds: tuple[int, ...]
    width: int
    height: int
    steps: int
    guidance: float
    strength: float
    program: Program
    sampler: str | None
    schedule: str | None
    compat: str | None
    has_image: bool = False
    shared_stream: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> int:
        return len(self.prompts)

    @property
    def guided(self) -> bool:
        return self.guidance > 1.0


def make_request(
    bundle: Bundle,
    prompt: str | Sequence[str],
    *,
    negative: str | Sequence[str] | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    schedule: str | None = None,
    guidance: float | None = None,
    seed: int | Sequence[int] | None = None,
    size: tuple[int, int] | None = None,
    images_per_prompt: int = 1,
    has_image: bool = False,
    strength: float = 1.0,
    compat: str | None = None,
    shared_stream: bool = False,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Request:
    """Fill what was left out from the bundle's defaults and check the rest; `ArgumentError` says what is wrong."""
    defaults = bundle.defaults
    steps = check_integer("steps", defaults.steps if steps is None else steps, 1, MOST_STEPS)
    timesteps, sigmas = _levels("timesteps", timesteps, 1), _levels("sigmas", sigmas, 2)
    if timesteps is not None or sigmas is not None:
        steps = len(timesteps) if timesteps is not None else len(sigmas or ()) - 1
    taken = RESERVED & set(options or {})
    if taken:
        raise ArgumentError(
            f"{', '.join(sorted(taken))} cannot be set as sampler options", expected="options such as eta"
        )
    width, height = check_size(bundle, size or (defaults.width, defaults.height))
    guidance = _real("guidance", defaults.guidance if guidance is None else guidance, 0.0, 1000.0)
    strength = _real("strength", strength, 0.0, 1.0)
    prompts, negatives, seeds = _images(
        prompt, negative, seed, check_integer("images_per_prompt", images_per_prompt, 1, MOST_IMAGES)
    )
    start = start_step(steps, strength) if has_image else 0
    if sampler is None:
        sampler, schedule = defaults.sampler, schedule or defaults.schedule
    program = choose_program(
        bundle,
        sampler=sampler,
        schedule=schedule,
        steps=steps,
        start=start,
        compat=compat,
        timesteps=timesteps,
        sigmas=sigmas,
        options=options or {},
    )
    return Request(
        prompts=prompts,
        negatives=negatives,
        seeds=seeds,
        width=width,
        height=height,
        steps=steps,
        guidance=guidance,
        strength=strength if has_image else 1.0,
        program=program,
        sampler=sampler,
        schedule=schedule,
        compat=compat,
        has_image=has_image,
        shared_stream=shared_stream,
        options={**(options or {})}
        | {k: v for k, v in (("timesteps", timesteps), ("sigmas", sigmas)) if v is not None},
    )


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
    scheduler = {**bundle.scheduler, "prediction_type": own.prediction} if own.prediction else bundle.scheduler
    if timesteps is None and sigmas is None and own.timesteps is not None:
        asked = (sampler, schedule, steps)
        timesteps = own.timesteps if asked == (own.sampler, own.schedule, len(own.timesteps)) else None
    explicit = timesteps is not None or sigmas is not None
    if schedule is not None and resolve_schedule(schedule) == "ays_sd" and bundle.family == "sdxl":
        schedule = "ays_sdxl"
    if sampler is None and schedule is None and not options:
        return program_from_diffusers(
            scheduler, steps=None if explicit else steps, timesteps=timesteps, sigmas=sigmas, start=start
        )
    noise = NoiseSchedule.from_diffusers(scheduler)
    return compile_program(
        sampler or str(bundle.scheduler["_class_name"]),
        schedule=schedule,
        steps=None if explicit else steps,
        noise=noise,
        start=start,
        compat=compat,
        timesteps=timesteps,
        sigmas=sigmas,
        **options,
    )


def start_step(steps: int, strength: float) -> int:
    """How many steps an image-to-image request skips; `ArgumentError` when none would remain."""
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


def check_size(bundle: Bundle, size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) in pixels, if the model can make it."""
    try:
        width, height = size
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"size is {size!r}", expected="(width, height) in pixels") from error
    unit = bundle.latent.factor * bundle.latent.multiple
    for name, value in (("width", width), ("height", height)):
        check_integer(name, value, 1, LARGEST_SIDE)
        if value % unit:
            low = max(unit, value // unit * unit)
            raise ArgumentError(
                f"{name} is {value}",
                expected=f"a multiple of {unit}",
                remedy=f"Use {low} or {value // unit * unit + unit}.",
            )
    return int(width), int(height)


def _images(
    prompt: str | Sequence[str], negative: str | Sequence[str] | None, seed: int | Sequence[int] | None, each: int
) -> tuple[tuple[str, ...], tuple[str | None, ...], tuple[int, ...]]:
    """Prompts, negatives and seeds of one length: the images asked for."""
    if not isinstance(prompt, (str, list, tuple)):
        check_prompt(prompt)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    prompts = [check_prompt(p) for p in prompts for _ in range(each)]
    if isinstance(seed, np.ndarray):
        seed = seed.tolist()
    if isinstance(seed, (list, tuple, range)):
        seeds = [_seed(s) for s in seed]
        if len(prompts) == 1:
            prompts = prompts * len(seeds)
    else:
        first = secrets.randbits(32) if seed is None else _seed(seed)
        seeds = [_seed(first + i) for i in range(len(prompts))]
    if not prompts or len(prompts) > MOST_IMAGES:
        raise ArgumentError(f"{len(prompts)} images are asked for", expected=f"1 to {MOST_IMAGES}")
    if len(seeds) != len(prompts):
        raise ArgumentError(
            f"{len(seeds)} seeds for {len(prompts)} images", expected="one seed an image, or a single seed"
        )
    if negative is None or isinstance(negative, str):
        given: list[str | None] = [None if negative is None else check_prompt(negative, "negative prompt")] * len(
            prompts
        )
    else:
        if not isinstance(negative, (list, tuple)):
            check_prompt(negative, "negative prompt")
        given = [check_prompt(n, "negative prompt") for n in negative for _ in range(each)]
        given = given * len(prompts) if len(given) == 1 else given
        if len(given) != len(prompts):
            raise ArgumentError(
                f"{len(given)} negative prompts for {len(prompts)} images", expected="one an image, or a single one"
            )
    return tuple(prompts), tuple(given), tuple(seeds)


def _levels(name: str, levels: Sequence[float] | None, least: int) -> list[float] | None:
    """Explicit timesteps or sigmas as a list of finite numbers."""
    if levels is None:
        return None
    try:
        found = [float(v) for v in levels]
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"{name} is {str(levels)[:60]!r}", expected="a list of numbers") from error
    if len(found) < least or not all(math.isfinite(v) for v in found):
        raise ArgumentError(f"{name} is {str(found)[:60]}", expected=f"at least {least} finite numbers")
    return found


def _seed(seed: object) -> int:
    check_seed(seed)
    return int(seed)  # type: ignore[call-overload, no-any-return]


def check_integer(name: str, value: object, low: int, high: int) -> int:
    """The value as an integer; `ArgumentError` unless it is one from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ArgumentError(f"{name} is {value!r}", expected="an integer")
    if not low <= value <= high:
        raise ArgumentError(f"{name} is {value}", expected=f"an integer from {low} to {high}")
    return int(value)


def _real(name: str, value: object, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise ArgumentError(f"{name} is {value!r}", expected="a number")
    if not math.isfinite(value) or not low <= value <= high:
        raise ArgumentError(f"{name} is {value}", expected=f"a finite number from {low:g} to {high:g}")
    return float(value)
