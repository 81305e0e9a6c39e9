"""A call in diffusers' signature as a request: its arguments read, and what cannot be honoured refused by its name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from ...bundle import Bundle
from ...errors import ArgumentError, UnknownNameError, UnsupportedError
from ...families.control import controls_of
from ..arguments import check_integer, check_real
from ..pictures.reading import as_stored
from ..programs import step_options
from ..request import Request, make_request
from ..result import Result, Step
from .components import Opened
from .loras import Adapters
from .outputs import Output, as_asked, as_tensor
from .schedulers import has_own_levels, run_own_levels
from .streams import Streams, read_streams

REFUSED = (
    "ip_adapter_image_embeds",
    "guidance_rescale",
    "denoising_start",
    "denoising_end",
    "masked_image_latents",
    "padding_mask_crop",
)
_DISTILLED = "LCMScheduler"
"""The one whose `set_timesteps` and `step` take what pipelines of latent consistency models hand to them."""
_EMBEDS = ("prompt_embeds", "negative_prompt_embeds")
_POOLED = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")


class Called(Protocol):
    """What a call reads of a pipeline: its class's signature and task, its bundle, the scheduler that was set."""

    @property
    def ARGUMENTS(self) -> Mapping[str, Any]: ...
    @property
    def BIG(self) -> bool: ...
    @property
    def task(self) -> str: ...
    @property
    def pipeline(self) -> Opened: ...
    @property
    def bundle(self) -> Bundle: ...
    @property
    def held_scheduler(self) -> Any: ...
    @property
    def lora_uses(self) -> Adapters: ...


def call(pipe: Called, positional: Sequence[Any], named: Mapping[str, Any]) -> Any:
    """Make images; the result is diffusers' `Output`, or its tuple with `return_dict=False`."""
    given = read_arguments(pipe, positional, named)
    _refuse(pipe, given)
    streams = read_streams(given["generator"], pipe.pipeline.device.name)
    request = make_call_request(pipe, given, streams)
    try:
        result = _run(pipe, request, given)
    finally:
        streams.leave()
    images = as_asked(result, given["output_type"])
    if given["return_dict"]:
        return Output(images)
    return (images,) if pipe.BIG else (images, None)


def read_arguments(pipe: Called, positional: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name, with diffusers' defaults; `UnknownNameError` for one that its signature has not."""
    names = pipe.ARGUMENTS
    for name in named:
        if name not in names:
            raise UnknownNameError(f"argument of {type(pipe).__name__}", name, names)
    try:
        bound = _signature(names).bind(*positional, **named)
    except TypeError as error:
        raise ArgumentError(f"the arguments of {type(pipe).__name__}: {error}") from error
    bound.apply_defaults()
    return dict(bound.arguments)


def _signature(arguments: Mapping[str, Any]) -> inspect.Signature:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature([inspect.Parameter(n, kind, default=v) for n, v in arguments.items()])


def _refuse(pipe: Called, given: Mapping[str, Any]) -> None:
    for name in (*REFUSED, *(("latents",) if pipe.task == "image" else ())):
        if name in given and given[name] not in (None, 0.0):
            raise UnsupportedError(f"{name} in a call in diffusers' signature", remedy="Leave it out.")
    if given["output_type"] not in ("pil", "np", "pt", "latent"):
        raise ArgumentError(f"output_type is {given['output_type']!r}", expected="pil, np, pt or latent")
    if pipe.bundle.respaces and not pipe.bundle.guidance_embedding:
        raise UnsupportedError(
            f"{type(pipe).__name__} with a UNet that takes no embedding of guidance (time_cond_proj_dim)",
            remedy=f"Use {pipe.bundle.model.pipelines[0]} or its kin, with LCMScheduler.",
        )
    tensors = list(given["callback_on_step_end_tensor_inputs"] or [])
    if set(tensors) - {"latents"}:
        raise UnsupportedError(f"callback_on_step_end_tensor_inputs {tensors}", expected="latents alone")


def make_call_request(pipe: Called, given: Mapping[str, Any], streams: Streams) -> Request:
    """The request of a call."""
    bundle = _distilled(pipe.bundle, given)
    config, factor = bundle.component("unet").config, bundle.latent.factor
    asked: dict[str, Any] = {
        "negative": given.get("negative_prompt"),
        "guidance": given["guidance_scale"],
        "images_per_prompt": given["num_images_per_prompt"],
        "clip_skip": given["clip_skip"] or 0,
        **{k: given.get(k) for k in (*_EMBEDS, *(_POOLED if pipe.BIG else ()))},
        **_steps(pipe, bundle.scheduler, given),
    }
    if given.get("latents") is not None:
        asked["latents"] = given["latents"]
    asked["loras"] = pipe.lora_uses.uses(_lora_scale(given["cross_attention_kwargs"]))
    side = int(config.get("sample_size") or 64) * factor
    size = (given.get("width") or side, given.get("height") or side)
    if given["ip_adapter_image"] is not None:
        asked["ip_adapter_image"] = _lone(_pictures("ip_adapter_image", given["ip_adapter_image"]))
    if pipe.task == "control":
        asked |= read_controls(bundle, given)
        first = asked["control"][min(asked["control"])]
        if given["height"] is None and given["width"] is None:
            shown = first[0] if isinstance(first, list) else first
            size = (shown.width // factor * factor, shown.height // factor * factor)
    elif pipe.task != "text":
        pictures = _pictures("image", given["image"])
        asked |= {"image": pictures, "strength": given["strength"]}
        if pipe.task == "image":
            size = (pictures[0].width // factor * factor, pictures[0].height // factor * factor)
        else:
            asked["mask"] = _pictures("mask_image", given["mask_image"])
    if pipe.BIG:
        asked |= {"prompt_2": given["prompt_2"], "negative_2": given["negative_prompt_2"]}
        asked |= _sizes(pipe.task, given)
    asked |= {"size": size, "shared_stream": streams.shared}
    prompts = given["prompt"] if given["prompt_embeds"] is None else given["prompt_embeds"]
    images = (1 if isinstance(prompts, str) or prompts is None else len(prompts)) * given["num_images_per_prompt"]
    if streams.sources and not streams.shared and len(streams.sources) != images:
        raise ArgumentError(
            f"{len(streams.sources)} generators for {images} images", expected="one an image, or one for all"
        )
    request = make_request(bundle, given["prompt"], **asked, **streams.seeds)
    return replace(request, generators=streams.drawn, first_draws=pipe.task == "inpaint")


def _lora_scale(given: Mapping[str, Any] | None) -> float:
    """What `cross_attention_kwargs` multiplies the LoRAs' scales by."""
    for name in given or {}:
        if name != "scale":
            raise UnsupportedError(
                f"cross_attention_kwargs with {name!r}", expected="scale alone", remedy="Leave it out."
            )
    return check_real("cross_attention_kwargs's scale", (given or {}).get("scale", 1.0), -100.0, 100.0)


def _distilled(bundle: Bundle, given: Mapping[str, Any]) -> Bundle:
    """The bundle with `original_inference_steps` of a call, where it has them."""
    asked = given.get("original_inference_steps")
    if asked is None:
        return bundle
    most = int(bundle.scheduler.get("num_train_timesteps", 1000))
    taught = check_integer("original_inference_steps", asked, 1, most)
    return replace(bundle, scheduler={**bundle.scheduler, "original_inference_steps": taught})


def read_controls(bundle: Bundle, given: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' pictures, scales and shares of a call under control, one or a list, by the bundle's names in order."""
    names = list(controls_of(bundle.component("unet").config))
    if not names:
        raise UnsupportedError(
            f"control of the bundle {bundle.name!r}, which was exported without",
            expected="a bundle with a ControlNet",
            remedy="Export the checkpoint again with: --controlnet NAME=PATH",
        )
    pictures = given["image"] if len(names) > 1 else [given["image"]]
    if not isinstance(pictures, (list, tuple)) or len(pictures) != len(names):
        raise ArgumentError("image is not a list", expected=f"a list of {len(names)}, for {', '.join(names)}")
    shown = {n: _lone(_pictures("image", p)) for n, p in zip(names, pictures, strict=True)}
    asked: dict[str, Any] = {"control": shown, "guess_mode": given["guess_mode"]}
    for argument in ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end"):
        value = given[argument]
        listed = list(value) if isinstance(value, (list, tuple)) else [value] * len(names)
        if len(listed) != len(names):
            raise ArgumentError(f"{argument} has {len(listed)} numbers", expected=f"one, or {len(names)}")
        asked[argument] = dict(zip(names, listed, strict=True))
    return asked


def _lone(pictures: list[Any]) -> Any:
    return pictures[0] if len(pictures) == 1 else pictures


def _steps(pipe: Called, config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What a call asks of its sampler: steps or explicit levels, and the options that the scheduler's `step` takes."""
    eta = {"eta": given["eta"]} if "eta" in step_options(config) and "eta" in given else {}
    levels = {"timesteps": given["timesteps"], "sigmas": given.get("sigmas")}
    held = pipe.held_scheduler
    handed = {}
    if "original_inference_steps" in given:
        if config["_class_name"] != _DISTILLED:
            raise UnsupportedError(f"{config['_class_name']} in {type(pipe).__name__}", expected=_DISTILLED)
        handed = {k: given[k] for k in ("original_inference_steps", "strength") if k in given}
    if held is not None and has_own_levels(held):
        own = run_own_levels(held, steps=given["num_inference_steps"], options=eta, handed=handed, **levels)
        return {"steps": own.steps, "compile_from": own.compile}
    explicit = any(v is not None for v in levels.values())
    return {"steps": None if explicit else given["num_inference_steps"], **levels, **eta}


def _sizes(task: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' (height, width) as ours, and what each of its pipelines makes of the negative ones."""
    negative = {f"negative_{n}": given[f"negative_{n}"] for n in ("original_size", "target_size")}
    crop = given["negative_crops_coords_top_left"]
    if task != "text":
        crop = given["crops_coords_top_left"]  # diffusers reads the other one here
    elif None in negative.values():
        negative, crop = dict.fromkeys(negative), None
    sizes = {"original_size": given["original_size"], "target_size": given["target_size"], **negative}
    return {
        **{k: None if v is None else tuple(v)[::-1] for k, v in sizes.items()},
        "crop_top_left": tuple(given["crops_coords_top_left"]),
        "negative_crop_top_left": None if crop is None else tuple(crop),
    }


def _run(pipe: Called, request: Request, given: Mapping[str, Any]) -> Result:
    callback = given["callback_on_step_end"]
    with_latents = "latents" in (given["callback_on_step_end_tensor_inputs"] or ())
    on_step = None if callback is None else lambda step: _tell(pipe, callback, step, with_latents=with_latents)
    return pipe.pipeline.run(request, on_step=on_step)


def _tell(pipe: Called, callback: Any, step: Step, *, with_latents: bool) -> None:
    """Call back after an evaluation; what it gives back may look at the latents and not replace them."""
    handed = {"latents": as_tensor(step.latents())} if with_latents else {}
    before = np.array(handed["latents"]) if with_latents else None
    answer = callback(pipe, step.index, step.timestep, dict(handed))
    if not isinstance(answer, Mapping):
        raise ArgumentError(f"the callback returned {type(answer).__name__}", expected="its dictionary")
    if with_latents and not np.array_equal(np.asarray(answer.get("latents", before)), np.asarray(before)):
        raise UnsupportedError("a callback that changes the latents", expected="one that looks at them")


def _pictures(name: str, given: Any) -> list[Any]:
    """Pillow images, one or several, as their pixels lie: diffusers turns them in `load_image` and nowhere else."""
    from PIL import Image as pillow

    pictures = list(given) if isinstance(given, (list, tuple)) else [given]
    if not pictures or not all(isinstance(p, pillow.Image) for p in pictures):
        kinds = ", ".join(sorted({type(p).__name__ for p in pictures})) or "nothing"
        raise UnsupportedError(f"{name} is {kinds}", expected="a Pillow image, or a list of them")
    return [as_stored(p) for p in pictures]
