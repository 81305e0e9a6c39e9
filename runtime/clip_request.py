"""A request for clips: checked as one for pictures is, with a first frame instead of a prompt."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from ..bundle import Bundle
from ..errors import ArgumentError
from ..families.image_prompt import IMAGE_ENCODER
from ..presets import preset_warnings
from ..schedules import FoundSchedules
from ..schedules.names import SEARCHED
from .arguments import check_flag, check_integer, check_levels, check_real
from .arrays import Float32
from .call import Call, make_call, recorded
from .clip import ClipTerms
from .noise.seeds import check_seed_device
from .pictures.antialias import antialiased_pixels
from .pictures.resize import fit_pictures, open_pictures
from .programs import MOST_STEPS, asked_or_own, choose_program, usual_steps
from .prompts.syntax import Prompt
from .prompts.wording import Wording, as_float32
from .request import MOST_IMAGES, PRESET_ARGUMENTS, Request, check_among, check_size, counted, with_seeds
from .searched import check_digest

LEAST_GUIDANCE, FPS, MOTION_BUCKET, NOISE_AUGMENTATION = 1.0, 7, 127, 0.02
"""What a request that says nothing gets, as in diffusers."""
MOST_FPS, MOST_MOTION, MOST_NOISE, MOST_GUIDANCE = 1024, 1023, 10.0, 1000.0
TAKEN = frozenset(
    {
        *("steps", "sampler", "schedule", "schedule_digest", "timesteps", "sigmas", "guidance", "compat", "options"),
        *("seed", "seed_device", "shared_stream", "images_per_prompt", "size", "latents", "image", "fit"),
        *("frames", "fps", "motion_bucket", "noise_augmentation", "min_guidance", "decode_chunk"),
    }
)
"""Arguments of a call that a clip has a use for."""


def make_clip_request(
    bundle: Bundle,
    prompt: str | Sequence[str] | None = None,
    *,
    default_size: tuple[int, int] | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
    **given: Any,
) -> Request:
    """As `make_request`, for a model that makes clips; `ArgumentError` says what is wrong.

    default_size: (width, height) where none is asked for: a clip has not its picture's, but the model's.
    """
    call = make_call(prompt, given)
    refuse_others(call)
    timesteps, sigmas = check_levels("timesteps", call.timesteps, 1), check_levels("sigmas", call.sigmas, 2)
    explicit, digest = timesteps is not None or sigmas is not None, call.schedule_digest
    sampler, schedule = asked_or_own(bundle, call.sampler, call.schedule, explicit=explicit, digest=digest)
    found = schedule if isinstance(schedule, FoundSchedules) else None
    if digest is not None:
        check_digest(found, digest)
    usual = usual_steps(bundle, schedule)
    steps = check_integer("steps", usual if call.steps is None else call.steps, 1, MOST_STEPS)
    if explicit:
        steps = counted(call.steps, timesteps, sigmas)
    defaults = bundle.defaults
    width, height = check_size(bundle, call.size or default_size or (defaults.width, defaults.height))
    if sizes is not None:
        check_among((width, height), sizes, own=False)
    opened = open_pictures(call)
    if not opened[0]:
        raise ArgumentError(
            "no image", expected="the picture that the clip begins with", remedy="Pass image (--image FILE)."
        )
    pictures = fit_pictures(bundle, call, opened, width, height)
    side = int(bundle.component(IMAGE_ENCODER).inputs[0].shape[-1])
    wording, seeds = _clips(call, len(opened[0]))
    check_seed_device(call.seed_device)
    terms = _terms(bundle, call, tuple(antialiased_pixels(p, side) for p in opened[0]))
    program = choose_program(
        bundle,
        sampler=sampler,
        schedule=schedule,
        steps=steps,
        compat=call.compat,
        timesteps=timesteps,
        sigmas=sigmas,
        options=call.options,
    )
    asked = {k: getattr(call, k) for k in PRESET_ARGUMENTS if k != "schedule" or not found}
    return Request(
        wording=wording,
        seeds=seeds,
        width=width,
        height=height,
        steps=steps,
        guidance=max(terms.guidance),
        strength=1.0,
        program=program,
        sampler=sampler,
        schedule=SEARCHED if found is not None else None if schedule is None else str(schedule),
        compat=call.compat,
        pictures=pictures,
        clip=terms,
        gaussians=_gaussians(bundle, call, terms.frames, (len(seeds), height, width)),
        seed_device=call.seed_device,
        shared_stream=call.shared_stream,
        found=found,
        warnings=(
            *preset_warnings(bundle, asked),
            *(found.warnings(guidance=max(terms.guidance), size=(width, height)) if found else ()),
        ),
        options={**call.options, **{k: v for k, v in (("timesteps", timesteps), ("sigmas", sigmas)) if v is not None}},
        recorded={**recorded(call), "frames": terms.frames, "fps": terms.fps, **_name(call)},
    )


def refuse_others(call: Call) -> None:
    """`ArgumentError` for what a clip has no use for: words, masks, what makes a picture of another."""
    for field in fields(Call):
        value = getattr(call, field.name)
        if field.name not in TAKEN and (value is not None if field.default is None else value != field.default):
            raise ArgumentError(
                f"{field.name} for a model that makes clips of a picture", remedy="Leave it out: pass image alone."
            )


def _terms(bundle: Bundle, call: Call, pixels: tuple[Float32, ...]) -> ClipTerms:
    def integer(name: str, otherwise: int, low: int, high: int) -> int:
        given = getattr(call, name)
        return check_integer(name, otherwise if given is None else given, low, high)

    frames = integer("frames", bundle.latent.frames, 2, bundle.latent.frames)
    noise = NOISE_AUGMENTATION if call.noise_augmentation is None else call.noise_augmentation
    return ClipTerms(
        frames=frames,
        fps=integer("fps", FPS, 1, MOST_FPS),
        motion_bucket=integer("motion_bucket", MOTION_BUCKET, 0, MOST_MOTION),
        noise_augmentation=check_real("noise_augmentation", noise, 0.0, MOST_NOISE),
        guidance=guidance_by_frame(call, bundle.defaults.guidance, frames),
        listed=is_listed(call.guidance),
        chunk=integer("decode_chunk", frames, 1, MOST_IMAGES),
        pixels=pixels,
    )


def is_listed(guidance: object) -> TypeGuard[Sequence[float]]:
    """Whether there is one number a frame."""
    return isinstance(guidance, (list, tuple, np.ndarray))


def guidance_by_frame(call: Call, usual: float, frames: int) -> tuple[float, ...]:
    """One factor a frame: those that were given, or evenly from `min_guidance` at the first to `guidance` at the last.

    g_i = min + (max - min) i / (F - 1), as `StableVideoDiffusionPipeline` of diffusers has it.
    """
    if is_listed(call.guidance):
        if call.min_guidance is not None:
            raise ArgumentError("min_guidance beside guidance by frame", expected="one of the two")
        if len(call.guidance) != frames:
            raise ArgumentError(
                f"guidance has {len(call.guidance)} numbers for {frames} frames", expected="one, or one a frame"
            )
        return tuple(check_real("guidance", g, 0.0, MOST_GUIDANCE) for g in call.guidance)
    most = check_real("guidance", usual if call.guidance is None else call.guidance, 0.0, MOST_GUIDANCE)
    least = LEAST_GUIDANCE if call.min_guidance is None else call.min_guidance
    least = check_real("min_guidance", least, 0.0, MOST_GUIDANCE)
    return tuple(np.linspace(least, most, frames).tolist())


def _clips(call: Call, pictures: int) -> tuple[Wording, tuple[int, ...]]:
    """So many clips without words, `images_per_prompt` of each picture, and their seeds."""
    check_flag("shared_stream", call.shared_stream)
    each = check_integer("images_per_prompt", call.images_per_prompt, 1, MOST_IMAGES)
    silent = Wording(positives=(Prompt(text=""),), negatives=(None,), loras=((),))
    return with_seeds(silent.repeated(pictures * each), call)


def _gaussians(bundle: Bundle, call: Call, frames: int, size: tuple[int, int, int]) -> Float32 | None:
    """The noise to start from, if it was given."""
    if call.latents is None:
        return None
    (count, height, width), latent = size, bundle.latent
    shape = (count, frames, latent.channels, height // latent.factor, width // latent.factor)
    return as_float32("latents", call.latents, shape)


def _name(call: Call) -> dict[str, str]:
    return {"image": Path(call.image).name} if isinstance(call.image, (str, os.PathLike)) else {}
