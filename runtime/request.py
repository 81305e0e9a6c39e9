"""A request: everything a caller asked for, checked before anything is computed."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import Bundle
from ..errors import ArgumentError, UnknownNameError
from ..families.base import latent_multiple
from ..families.decoders import DECODERS, FULL
from ..presets import preset_warnings
from ..schedules import FoundSchedules, Program
from ..schedules.names import SEARCHED
from ..schedules.solvers.registry import SAMPLERS
from .arguments import check_flag, check_levels, check_pair, check_real, check_seed
from .arguments import check_integer as check_integer
from .arrays import Float32
from .call import CLIP_ARGUMENTS, Call, make_call, recorded
from .clip import ClipTerms
from .conditioning import Arrays
from .effects import call_warnings
from .noise.seeds import Gaussians, check_seed_device
from .pictures.control import Control, make_controls, open_controls, recorded_controls
from .pictures.image_prompt import ImagePrompt, read_image_prompt, recorded_image_prompt
from .pictures.inpaint import check_mask_for
from .pictures.resize import Pictures, fit_pictures, open_pictures, size_of
from .pictures.told import ToldPictures, read_told
from .programs import MOST_STEPS, asked_or_own, choose_program, usual_steps
from .prompts.editing import prompt_runs
from .prompts.encoders import Embedding
from .prompts.syntax import Prompt
from .prompts.wording import Wording, as_float32, read_wording
from .searched import check_digest

MOST_IMAGES = 1024
LARGEST_SIDE = 16_384
SIZE_ARGUMENTS = tuple(f"{n}{a}" for n in ("", "negative_") for a in ("original_size", "crop_top_left", "target_size"))
PRESET_ARGUMENTS = ("steps", "guidance", "sampler", "schedule", "size")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """One call, one entry an image: seeds, and what each image is told (`wording`).

    `shared_stream` draws all noise from the first seed's generator, as diffusers does for one generator. `sizes` are
    what the prompt's row and the negative's are told of them. `gaussians` float32 [B, C, h, w], if given, are the noise
    to start from; `generators` draw instead of the seeds', one an image, or one where the stream is shared. With
    `first_draws` only the first of them draws for the latents of a picture that several images share, as diffusers does
    in inpainting. `variation_seeds`, if any, are those whose noise that to start from is turned towards, by
    `variation`. `start_latents` float32 [B, C, h, w] are begun with instead of the pictures' own. `told` are pictures
    that the UNet is told of. `clip` is what is asked of a clip beside its picture, whose `guidance` then is the largest
    of its frames'. `controls` and `image_prompt` are what networks beside the UNet are told. `decoder` makes the
    pixels. `own_size` says that no size was asked for and the first picture's was taken. `found` are the schedules that
    the program is one of, if they were found for the model. `warnings` say what goes against those, the bundle's preset
    or a picture's proportions. `recorded` are arguments for a picture's parameters that have no field here.
    """

    wording: Wording
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
    sizes: tuple[Arrays, Arrays] = ({}, {})
    pictures: Pictures | None = None
    told: ToldPictures | None = None
    clip: ClipTerms | None = None
    controls: tuple[Control, ...] = ()
    image_prompt: ImagePrompt | None = None
    decoder: str = FULL
    gaussians: Float32 | None = None
    seed_device: str = "cpu"
    generators: tuple[Gaussians, ...] | None = None
    first_draws: bool = False
    variation_seeds: tuple[int, ...] = ()
    variation: float = 0.0
    start_latents: Float32 | None = None
    own_size: bool = False
    found: FoundSchedules | None = None
    shared_stream: bool = False
    warnings: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    recorded: Mapping[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> int:
        return len(self.seeds)

    @property
    def has_image(self) -> bool:
        return self.pictures is not None

    @property
    def guided(self) -> bool:
        return self.guidance > 1.0

    def runs(self, prompt: Prompt | Embedding) -> Sequence[tuple[int, Prompt | Embedding]]:
        """A prompt as it is from its first evaluation on, and wherever it changes; see `prompt_runs`."""
        if isinstance(prompt, Embedding):
            return [(0, prompt)]
        sampler = SAMPLERS.get(self.program.sampler)
        total = self.steps * (1 if sampler is None else sampler.stages)
        return prompt_runs(prompt, max(total, 1), self.program.evaluations)

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts as texts; empty where an embedding was given."""
        return self.wording.texts

    @property
    def negatives(self) -> tuple[str | None, ...]:
        """The negative prompts as texts; `None` where none was given."""
        return self.wording.negative_texts


def make_request(
    bundle: Bundle,
    prompt: str | Sequence[str] | None = None,
    *,
    default_size: tuple[int, int] | None = None,
    compile_from: Callable[[float | None], Program] | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
    **given: Any,
) -> Request:
    """Fill what was left out from the bundle's defaults and check the rest; `ArgumentError` says what is wrong.

    given: the fields of `Call`, and options of the sampler. default_size: (width, height) where none is asked for and
    there is no picture that has one. compile_from: makes the program from the strength of the picture, if there is one,
    instead of sampler, schedule and options. sizes: those that may be made, where not any may.
    """
    call = make_call(prompt, given)
    for name in CLIP_ARGUMENTS:
        if getattr(call, name) is not None:
            raise ArgumentError(f"{name} for a model that makes pictures", remedy="Leave it out.")
    defaults = bundle.defaults
    timesteps, sigmas = check_levels("timesteps", call.timesteps, 1), check_levels("sigmas", call.sigmas, 2)
    explicit = timesteps is not None or sigmas is not None
    digest = call.schedule_digest
    sampler, schedule = asked_or_own(bundle, call.sampler, call.schedule, explicit=explicit, digest=digest)
    found = schedule if isinstance(schedule, FoundSchedules) else None
    if digest is not None:
        check_digest(found, digest)
    usual = usual_steps(bundle, schedule)
    steps = check_integer("steps", usual if call.steps is None else call.steps, 1, MOST_STEPS)
    if explicit:
        steps = counted(call.steps, timesteps, sigmas)
    if call.mask_threshold is not None:
        check_real("mask_threshold", call.mask_threshold, 0.0, 1.0)
    changed = 0.8 if call.mask is None else 1.0
    strength = check_real("strength", changed if call.strength is None else call.strength, 0.0, 1.0)
    told = read_told(bundle, call)
    opened = open_pictures(call) if bundle.model.pictures == "start" else ([], [])
    if call.image is None and strength < 1.0 and call.strength is not None:
        raise ArgumentError(f"strength {strength:g} without an image", remedy="Pass image, or leave strength out.")
    shown = open_controls(bundle, call)
    first = next((p for p in (*opened[0], *(p for ps in shown.values() for p in ps)) if p is not None), None)
    own = size_of(bundle, first) if first is not None and call.size is None else None
    width, height = check_size(bundle, call.size or own or default_size or (defaults.width, defaults.height))
    if sizes is not None:
        check_among((width, height), sizes, own=own is not None)
    guidance = check_real("guidance", defaults.guidance if call.guidance is None else call.guidance, 0.0, 1000.0)
    wording, seeds = _images(bundle, call, len(opened[0] if told is None else told.pixels))
    if told is not None:
        told.check(len(seeds))
    check_seed_device(call.seed_device)
    pictures = fit_pictures(bundle, call, opened, width, height)
    asked = None if pictures is None else strength
    program = (
        choose_program(
            bundle,
            sampler=sampler,
            schedule=schedule,
            steps=steps,
            strength=asked,
            respaces=bundle.respaces and call.mask is None,
            compat=call.compat,
            timesteps=timesteps,
            sigmas=sigmas,
            options=call.options,
        )
        if compile_from is None
        else compile_from(asked)
    )
    if pictures is not None:
        pictures = pictures.of_images(len(seeds))
        program = _from_picture(program, pictures)
    controls = make_controls(
        bundle, call, shown, size=(width, height), images=len(seeds), evaluations=program.evaluations
    )
    levels = {k: v for k, v in (("timesteps", timesteps), ("sigmas", sigmas)) if v is not None}
    request = Request(
        wording=wording,
        seeds=seeds,
        width=width,
        height=height,
        steps=steps,
        guidance=guidance,
        strength=1.0 if pictures is None else strength,
        program=program,
        sampler=sampler,
        schedule=SEARCHED if isinstance(schedule, FoundSchedules) else schedule,
        compat=call.compat,
        sizes=_sizes(bundle, call, width, height),
        pictures=pictures,
        told=told,
        controls=controls,
        image_prompt=read_image_prompt(bundle, call, len(seeds)),
        decoder=check_decoder(bundle, call.decoder),
        gaussians=_gaussians(bundle, call, (len(seeds), height, width), program),
        seed_device=call.seed_device,
        variation_seeds=_variation_seeds(call, len(seeds)),
        variation=call.variation,
        shared_stream=call.shared_stream,
        own_size=own is not None,
        found=found,
        warnings=(
            *preset_warnings(bundle, {k: getattr(call, k) for k in PRESET_ARGUMENTS if k != "schedule" or not found}),
            *(found.warnings(guidance=guidance, size=(width, height)) if found else ()),
            *(() if own is None or first is None else rounding_warnings(bundle, first.size, own)),
            *call_warnings(bundle, call, guidance=guidance, shown=first is not None),
        ),
        options={**call.options, **levels},
        recorded={**recorded(call), **_names(call)},
    )
    for one in dict.fromkeys(p for p in (*wording.positives, *wording.negatives) if p is not None):
        request.runs(one)  # what cannot be read of a prompt that changes is told before anything is computed
    return request


def _sizes(bundle: Bundle, call: Call, width: int, height: int) -> tuple[Arrays, Arrays]:
    """What the UNet is told of sizes and corners, from those arguments of a call that its family takes."""
    admitted = bundle.model.size_arguments
    for name in SIZE_ARGUMENTS:
        if name not in admitted and getattr(call, name) not in (None, (0, 0)):
            raise ArgumentError(f"{name} for a model that is told no sizes", remedy="Leave it out.")
    asked = {n: getattr(call, n) for n in admitted}
    pairs = {n: None if v is None else check_pair(n, v, *admitted[n]) for n, v in asked.items()}
    return bundle.model.sizes(width, height, pairs)


def counted(asked: int | None, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None) -> int:
    """How many steps explicit timesteps or sigmas make; `ArgumentError` where another number was asked for."""
    count = len(timesteps) if timesteps is not None else len(sigmas or ()) - 1
    if asked not in (None, count):
        name = "timesteps" if timesteps is not None else "sigmas"
        raise ArgumentError(f"steps is {asked}, and the {name} make {count}", remedy=f"Leave steps or {name} out.")
    return count


def _from_picture(program: Program, pictures: Pictures) -> Program:
    """The program as it runs from pictures: one that skips no step starts from noise *and* picture, as in diffusers.

    With a mask it starts from noise alone.
    """
    if pictures.masks is not None:
        check_mask_for(program, pictures.masks)
        return program
    if program.init_latent:
        return program
    sigma = float(program.sigmas[0])
    scale = 1.0 / math.sqrt(1.0 + sigma * sigma)
    return replace(program, init_latent=scale, init_noise=sigma * scale)


def _gaussians(bundle: Bundle, call: Call, size: tuple[int, int, int], program: Program) -> Float32 | None:
    """The noise to start from, if it was given."""
    if call.latents is None:
        return None
    if program.init_latent:
        raise ArgumentError("latents beside an image", expected="one of the two", remedy="Leave latents out.")
    count, height, width = size
    latent = bundle.latent
    return as_float32(
        "latents", call.latents, (count, latent.channels, height // latent.factor, width // latent.factor)
    )


def _names(call: Call) -> dict[str, Any]:
    """The names of the files that a call starts from, for its pictures' parameters."""
    given = (("image", call.image), ("mask", call.mask))
    return {k: Path(v).name for k, v in given if isinstance(v, (str, os.PathLike))} | {
        **recorded_controls(call),
        **recorded_image_prompt(call),
    }


def check_size(bundle: Bundle, size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) in pixels, if the model can make it."""
    try:
        width, height = size
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"size is {size!r}", expected="(width, height) in pixels") from error
    unit = bundle.latent.unit
    for name, value in (("width", width), ("height", height)):
        check_integer(name, value, 1, LARGEST_SIDE)
        if value % unit:
            low = max(unit, value // unit * unit)
            raise ArgumentError(
                f"{name} is {value}",
                expected=f"a multiple of {unit}",
                remedy=" ".join([f"Use {low} or {value // unit * unit + unit}.", *_finer(bundle)]),
            )
    return int(width), int(height)


def check_decoder(bundle: Bundle, decoder: str) -> str:
    """A decoder's name, if the bundle has that one."""
    if decoder not in DECODERS:
        raise UnknownNameError("decoder", str(decoder)[:40], DECODERS)
    if DECODERS[decoder] not in bundle.components:
        raise ArgumentError(
            f"decoder {decoder!r}, which the bundle {bundle.name!r} has not",
            expected=f"{FULL!r}",
            remedy="Export the checkpoint again with --tiny-decoder PATH.",
        )
    return decoder


def check_among(size: tuple[int, int], sizes: Sequence[tuple[int, int]], *, own: bool) -> None:
    """`ArgumentError` for a size (width, height) that is not among those; `own`: a picture's, none was asked for."""
    if size not in sizes:
        raise ArgumentError(
            f"{'the own size of the picture, as none is asked for,' if own else 'size'} is {size[0]}x{size[1]}",
            expected=f"one of {', '.join(f'{w}x{h}' for w, h in sizes)}",
            remedy="Ask for one of these: the picture is fitted to it." if own else "",
        )


def rounding_warnings(bundle: Bundle, picture: tuple[int, int], size: tuple[int, int]) -> list[str]:
    """A warning where a picture (width, height) was rounded to `size` by more than its VAE asks, else none."""
    if all(a - b < bundle.latent.factor for a, b in zip(picture, size, strict=True)):
        return []
    words = f"the picture is {picture[0]}x{picture[1]} and becomes {size[0]}x{size[1]}, in multiples of"
    return [" ".join([f"{words} {bundle.latent.unit}.", *_finer(bundle)])]


def _finer(bundle: Bundle) -> list[str]:
    """What gives a bundle the sizes that it refuses, if anything does: its UNet was traced before it interpolated."""
    finer = bundle.latent.factor * latent_multiple(bundle.component("unet").config)
    return [] if finer == bundle.latent.unit else [f"Exported again, it takes multiples of {finer}."]


def _images(bundle: Bundle, call: Call, pictures: int) -> tuple[Wording, tuple[int, ...]]:
    """What each image is told, and its seed."""
    check_flag("shared_stream", call.shared_stream)
    each = check_integer("images_per_prompt", call.images_per_prompt, 1, MOST_IMAGES)
    wording = read_wording(bundle, call, each)
    if pictures > 1 and wording.images in (1, each):
        wording = read_wording(bundle, call, 1).repeated(pictures * each)
    return with_seeds(wording, call)


def with_seeds(wording: Wording, call: Call) -> tuple[Wording, tuple[int, ...]]:
    """The wording of all images and the seed of each, where the call gives one seed, or one an image."""
    seed = call.seed.tolist() if isinstance(call.seed, np.ndarray) else call.seed
    if isinstance(seed, (list, tuple, range)):
        seeds = [_seed(s) for s in seed]
        if wording.images == 1:
            wording = wording.repeated(len(seeds))
    else:
        first = secrets.randbits(32) if seed is None else _seed(seed)
        seeds = [_seed(first + (0 if call.variation else i)) for i in range(wording.images)]
    if not wording.images or wording.images > MOST_IMAGES:
        raise ArgumentError(f"{wording.images} images are asked for", expected=f"1 to {MOST_IMAGES}")
    if len(seeds) != wording.images:
        raise ArgumentError(
            f"{len(seeds)} seeds for {wording.images} images", expected="one seed an image, or a single seed"
        )
    return wording, tuple(seeds)


def _variation_seeds(call: Call, images: int) -> tuple[int, ...]:
    """The seed by image that its noise is turned towards; none where it is not turned."""
    share, seed = check_real("variation", call.variation, 0.0, 1.0), call.variation_seed
    if not share:
        if seed is not None:
            raise ArgumentError("variation_seed without variation", expected="a share of it", remedy="Pass variation.")
        return ()
    for name, given in (("shared_stream", call.shared_stream), ("latents", call.latents is not None)):
        if given:
            raise ArgumentError(f"variation beside {name}", expected="one of the two", remedy="Leave variation out.")
    if isinstance(seed, (list, tuple, range, np.ndarray)):
        if len(seed) != images:
            raise ArgumentError(
                f"{len(seed)} variation seeds for {images} images", expected="one an image, or a single one"
            )
        return tuple(_seed(s) for s in seed)
    first = secrets.randbits(32) if seed is None else _seed(seed)
    return tuple(_seed(first + i) for i in range(images))


def _seed(seed: object) -> int:
    check_seed(seed)
    return int(seed)  # type: ignore[call-overload, no-any-return]
