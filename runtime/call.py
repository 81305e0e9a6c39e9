"""What a caller may ask of a pipeline: every argument of a call, in one place."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, TypeVar

from ..errors import ArgumentError, UnknownNameError
from ..families.decoders import FULL
from ..schedules import FoundSchedules
from ..schedules.compat.classes import CLASSES, COMMON
from ..schedules.solvers.registry import SAMPLERS
from ..schedules.spacing import SPACINGS

F = TypeVar("F", bound=Callable[..., Any])
RESERVED = frozenset({"start", "noise", "prediction"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """The arguments of a call; `None` stands for the bundle's own wherever that makes sense.

    prompt, negative: one, or one an image. loras: files of LoRAs (names, where the pipeline has a folder of them), each
    with its scale (a number, or by component: `{"unet": 0.8}`), or such a mapping for each prompt; `<lora:name:0.8>` in
    a prompt of A1111's syntax adds to it.

    prompt_2, negative_2: what a second text encoder reads instead.
    prompt_syntax: `"plain"`, or `"a1111"` for `(word:1.3)`, `[word]`, BREAK, and prompts that change on the way,
    `[from:to:0.5]` and `[one|other]`. long_prompts: `"truncate"` what one
    pass of the text encoder does not take (as diffusers), or `"chunk"`. clip_skip: layers of the text encoders left
    out, counted as diffusers does. prompt_embeds, negative_prompt_embeds: float32 [N, T, D] instead of prompts, and
    pooled_prompt_embeds, negative_pooled_prompt_embeds: float32 [N, P], which some families need beside them.

    steps: steps of the schedule (two-stage samplers evaluate twice in each). sampler, schedule: any name that
    `fewstep samplers` lists; without them the checkpoint's own scheduler, as diffusers runs it. schedule may also be
    schedules that were found for the model (`load_schedules`), or the `pathlib.Path` of their file, never its name as a
    text; `"searched"` are those that the bundle holds. schedule_digest: how the digest of found ones must begin, as
    pictures record it. timesteps, sigmas: explicit ones, one of the two, instead of steps and schedule. guidance:
    classifier-free guidance scale; at or below 1 the negative prompt is not evaluated. compat: `"diffusers"` for that
    library's conventions. options: of the sampler (`eta`, ...).

    seed: one for the first image (the next ones get the next integers), or one an image. seed_device: whose noise,
    that of torch's `"cpu"` or `"cuda"` generator (`"cuda:43008"`: of a GPU of so many threads). shared_stream: draw the
    whole batch from the first seed, as diffusers does for a single generator. images_per_prompt: images, with
    successive seeds, of each prompt. variation_seed: whose noise that of the seed is turned towards, by variation (0
    to 1), as A1111's web UI does: the images then share their first seed, and the variation seed counts on; or one an
    image.

    size: (width, height) in pixels; without it a picture's own, else the size that was loaded. original_size,
    target_size (width, height) and crop_top_left (top, left): what some families' UNets are told of a picture; the
    negative ones default to them. latents: float32 [B, C, h, w], unit noise to start from instead of the seeds'.

    image: start from a picture, or from one an image (or a prompt): a path, a Pillow image or uint8 [H, W, 3].
    strength: how much of it to change, 0 to 1; steps x strength must be 1 or more; 0.8 without a mask and 1 with one.
    Without a size the picture keeps its own, rounded down to what the model takes. fit: where that or the size asked
    for is another, `"stretch"` it (or `"diffusers"`, the same), `"cover"` the size and crop, or `"contain"` it in the
    size and repeat its edges.
    mask: white where the picture is made anew, black where it stays. mask_threshold: from which grey on it is white;
    `None` leaves it soft, which samplers that step from older states refuse.

    control: pictures for the ControlNets that the bundle was exported with, by their names: one for all images, or one
    an image, `None` for images without. They are fitted as `fit` says, and give the size where nothing else does.
    controlnet_conditioning_scale: how much of what they say is taken (1), control_guidance_start, control_guidance_end:
    between which shares of the evaluations (0 to 1); each for all, or by name. guess_mode: only the prompt's row is
    told, and less of it the nearer to the picture, as diffusers does. canny: the names of controls whose pictures are
    photographs, of which edges are taken; or by name the thresholds, of which `(100, 200)` are the usual ones.

    noise_level: of a picture that the UNet is told of and makes larger (`image`, in families of such models): how much
    noise is put into it, a timestep from 0 to 999. Such a picture may also be float32 [3, h, w] or [B, 3, h, w] from -1
    to 1, as the stage before gives it in its result's `latents`.

    ip_adapter_image: a picture as prompt, for the IP-Adapter that the bundle was exported with: one for all images, or
    one an image, `None` for images without. ip_adapter_scale: how much of it is taken (1), one for all attentions or
    one for each of those to prompts, down, up and middle blocks in this order.

    decoder: `"full"`, or `"tiny"` for the tiny autoencoder's that the bundle was exported with: faster, and a little
    another picture.

    Of models that make clips, whose `image` is what the clip begins with: frames: how many (the model's own number).
    fps: frames per second, of the file and as the model is told (7). motion_bucket: how much moves, 0 to 1023 (127).
    noise_augmentation: how much noise is laid over the picture, 0 to 10 (0.02). guidance: of the last frame, with
    min_guidance (1) of the first and what lies evenly between; or one a frame. decode_chunk: frames that the VAE
    decodes together (all); fewer take less memory and are less alike.
    """

    prompt: str | Sequence[str] | None = None
    negative: str | Sequence[str] | None = None
    loras: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None
    prompt_2: str | Sequence[str] | None = None
    negative_2: str | Sequence[str] | None = None
    prompt_syntax: str = "plain"
    long_prompts: str | None = None
    clip_skip: int = 0
    prompt_embeds: Any = None
    negative_prompt_embeds: Any = None
    pooled_prompt_embeds: Any = None
    negative_pooled_prompt_embeds: Any = None
    steps: int | None = None
    sampler: str | None = None
    schedule: str | os.PathLike[str] | FoundSchedules | None = None
    schedule_digest: str | None = None
    timesteps: Sequence[float] | None = None
    sigmas: Sequence[float] | None = None
    guidance: float | Sequence[float] | None = None
    compat: str | None = None
    seed: int | Sequence[int] | None = None
    seed_device: str = "cpu"
    shared_stream: bool = False
    variation_seed: int | Sequence[int] | None = None
    variation: float = 0.0
    images_per_prompt: int = 1
    size: tuple[int, int] | None = None
    original_size: tuple[int, int] | None = None
    crop_top_left: tuple[int, int] = (0, 0)
    target_size: tuple[int, int] | None = None
    negative_original_size: tuple[int, int] | None = None
    negative_crop_top_left: tuple[int, int] | None = None
    negative_target_size: tuple[int, int] | None = None
    latents: Any = None
    image: Any = None
    strength: float | None = None
    noise_level: int | None = None
    fit: str = "stretch"
    mask: Any = None
    mask_threshold: float | None = 0.5
    control: Mapping[str, Any] | None = None
    controlnet_conditioning_scale: float | Mapping[str, float] | None = None
    control_guidance_start: float | Mapping[str, float] | None = None
    control_guidance_end: float | Mapping[str, float] | None = None
    guess_mode: bool = False
    canny: Sequence[str] | Mapping[str, tuple[float, float]] | None = None
    ip_adapter_image: Any = None
    ip_adapter_scale: float | Sequence[float] | None = None
    frames: int | None = None
    fps: int | None = None
    motion_bucket: int | None = None
    noise_augmentation: float | None = None
    min_guidance: float | None = None
    decode_chunk: int | None = None
    decoder: str = FULL
    options: Mapping[str, Any] = field(default_factory=dict)


NAMES = tuple(f.name for f in fields(Call) if f.name != "options")
CLIP_ARGUMENTS = ("frames", "fps", "motion_bucket", "noise_augmentation", "min_guidance", "decode_chunk")
"""Of models that make clips alone."""
RECORDED = (
    "seed_device",
    "noise_level",
    "fit",
    "mask_threshold",
    "prompt_syntax",
    "long_prompts",
    "clip_skip",
    "original_size",
    "crop_top_left",
    "target_size",
    "negative_original_size",
    "negative_crop_top_left",
    "negative_target_size",
    "decoder",
    *CLIP_ARGUMENTS,
)
"""Arguments that a picture's parameters hold only where they were given."""
CONTROL_WORDS = ("control", "control_guidance_start", "control_guidance_end", "canny")
"""Arguments about controls that they hold as lists of the command line's words."""
IMAGE_PROMPT = ("ip_adapter_image", "ip_adapter_scale")


@cache
def option_names() -> frozenset[str]:
    """The names of every sampler's and schedule's options, and of diffusers' schedulers'."""
    ours = [*(s.options for s in SAMPLERS.values()), *(s.options for s in SPACINGS.values())]
    theirs = [(*c.reads, *c.step_options) for c in CLASSES.values()]
    return frozenset({"eta", "last_sigma", *COMMON}.union(*ours, *theirs))


def make_call(prompt: str | Sequence[str] | None, given: Mapping[str, Any]) -> Call:
    """A call from keyword arguments; what `Call` does not name is an option of the sampler.

    Raises `UnknownNameError` for what is an option of none.
    """
    own = given.get("options") or {}
    if not isinstance(own, Mapping) or not all(isinstance(k, str) for k in own):
        raise ArgumentError(
            f"options is {str(own)[:60]!r}", expected='options of the sampler by name, like {"eta": 0.5}'
        )
    loose = {k: v for k, v in given.items() if k not in NAMES and k != "options"}
    if unknown := next((k for k in loose if k not in option_names() | RESERVED), None):
        raise UnknownNameError("argument of a call", unknown, (*NAMES, *option_names()))
    options = {**own, **loose}
    taken = {*RESERVED, *NAMES} & set(options)
    if taken:
        raise ArgumentError(
            f"{', '.join(sorted(taken))} cannot be set as sampler options", expected="options such as eta"
        )
    return Call(**{**{k: v for k, v in given.items() if k in NAMES}, "prompt": prompt, "options": options})


def recorded(call: Call) -> dict[str, Any]:
    """What a picture's parameters say of a call beside the common arguments: what was not left as it is."""
    plain = {f.name: f.default for f in fields(Call)}
    return {k: "none" if (v := getattr(call, k)) is None else v for k in RECORDED if getattr(call, k) != plain[k]}


def takes_a_call(function: F) -> F:
    """Show the fields of `Call` in the signature of a function that passes them on as keyword arguments."""
    own = inspect.signature(function)
    named = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD and p.name != "prompt"]
    asked = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in fields(Call)
        if f.name not in {"prompt", "options"} and f.name not in own.parameters
    ]
    first = inspect.Parameter("prompt", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
    before = [p for p in named if p.kind is not p.KEYWORD_ONLY]
    after = [p for p in named if p.kind is p.KEYWORD_ONLY]
    rest = inspect.Parameter("options", inspect.Parameter.VAR_KEYWORD)
    function.__signature__ = own.replace(parameters=[*before, first, *asked, *after, rest])  # type: ignore[attr-defined]
    return function
