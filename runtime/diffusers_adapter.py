"""diffusers' pipelines by their own signatures, upon a bundle: a service swaps one import.

    from fewstep.runtime.diffusers_adapter import StableDiffusionPipeline
    pipe = StableDiffusionPipeline.from_pretrained("bundle-folder")

Arguments, their order and their defaults are those of diffusers 0.42; one that cannot be honoured is refused by its
name. docs/prompts.md lists what differs.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from ..bundle import Defaults
from ..errors import ArgumentError, UnsupportedError
from .loader import load
from .noise.seeds import Gaussians, TorchCpuGenerator
from .noise.torch_state import is_generator, read_generator, seed_of, write_back
from .pictures.reading import as_stored
from .pipeline import Pipeline
from .programs import step_options
from .request import Request, make_request
from .result import Result, Step

_PROMPTS = {"prompt": None}
_SECOND = {"prompt_2": None}
_SIZE = {"height": None, "width": None}
_STEPS = {"num_inference_steps": 50, "timesteps": None, "sigmas": None}
_NEGATIVE = {"negative_prompt": None}
_NOISE = {"num_images_per_prompt": 1, "eta": 0.0, "generator": None}
_EMBEDS = {"prompt_embeds": None, "negative_prompt_embeds": None}
_POOLED = {"pooled_prompt_embeds": None, "negative_pooled_prompt_embeds": None}
_ADAPTERS = {"ip_adapter_image": None, "ip_adapter_image_embeds": None}
_OUTPUT = {"output_type": "pil", "return_dict": True, "cross_attention_kwargs": None}
_CALLBACK = {"callback_on_step_end": None, "callback_on_step_end_tensor_inputs": ["latents"]}
_SIZES = {
    "original_size": None,
    "crops_coords_top_left": (0, 0),
    "target_size": None,
    "negative_original_size": None,
    "negative_crops_coords_top_left": (0, 0),
    "negative_target_size": None,
}
_SCORES = {"aesthetic_score": 6.0, "negative_aesthetic_score": 2.5}
_MASK = {"image": None, "mask_image": None, "masked_image_latents": None}
_REFUSED = (
    "ip_adapter_image",
    "ip_adapter_image_embeds",
    "cross_attention_kwargs",
    "guidance_rescale",
    "denoising_start",
    "denoising_end",
    "masked_image_latents",
    "padding_mask_crop",
)


@dataclass(frozen=True, slots=True)
class Output:
    """diffusers' result: `images`, and `nsfw_content_detected`: `None`, since bundles hold no safety checker."""

    images: Any
    nsfw_content_detected: None = None

    def __getitem__(self, key: int | str) -> Any:
        return getattr(self, key) if isinstance(key, str) else (self.images, self.nsfw_content_detected)[key]


class DiffusersPipeline:
    """What diffusers' Stable Diffusion pipelines have in common, on a `Pipeline`.

    `scheduler` may be replaced by any of diffusers' scheduler objects whose class the samplers cover; its `config`
    is read.
    """

    ARGUMENTS: ClassVar[Mapping[str, Any]] = {}
    BIG: ClassVar[bool] = False
    task: ClassVar[str] = "text"

    def __init__(self, pipeline: Pipeline) -> None:
        admitted = pipeline.bundle.model.pipelines
        if not any(c.__name__ in admitted for c in type(self).__mro__):
            raise ArgumentError(
                f"{type(self).__name__} for a bundle of family {pipeline.bundle.family}",
                expected=f"{admitted[0]} or another of its family",
            )
        self.pipeline = pipeline
        own = pipeline.bundle.defaults
        plain = Defaults(
            width=own.width, height=own.height, steps=own.steps, guidance=own.guidance, prediction=own.prediction
        )
        self._bundle = replace(pipeline.bundle, defaults=plain)

    @classmethod
    def from_pretrained(cls, bundle: Any, **options: Any) -> DiffusersPipeline:
        """From a bundle's folder; options are those of `fewstep.load`, for precision was decided at the export."""
        return cls(bundle if isinstance(bundle, Pipeline) else load(bundle, **options))

    @property
    def scheduler(self) -> Any:
        """The scheduler's configuration, as diffusers' `from_config` takes it."""
        return SimpleNamespace(config=dict(self._bundle.scheduler))

    @scheduler.setter
    def scheduler(self, value: Any) -> None:
        config = dict(getattr(value, "config", value))
        config["_class_name"] = type(value).__name__ if hasattr(value, "set_timesteps") else config.get("_class_name")
        self._bundle = replace(self._bundle, scheduler=config)

    def to(self, *_: Any, **__: Any) -> DiffusersPipeline:
        """Nothing: device and precision were chosen when the bundle was loaded and exported."""
        return self

    def set_progress_bar_config(self, **_: Any) -> None:
        """Nothing: there is no bar to set."""

    def __call__(self, *positional: Any, **named: Any) -> Any:
        bound = _SIGNATURES[type(self)].bind(self, *positional, **named)
        bound.apply_defaults()
        given = {k: v for k, v in bound.arguments.items() if k != "self"}
        self._refuse(given)
        request, generators = self._request(given)
        try:
            result = self._run(request, given)
        finally:
            for theirs, ours in generators:
                write_back(theirs, ours)
        images = _images(result, given["output_type"])
        if given["return_dict"]:
            return Output(images)
        return (images,) if self.BIG else (images, None)

    def _refuse(self, given: Mapping[str, Any]) -> None:
        for name in (*_REFUSED, *(("latents",) if self.task == "image" else ())):
            if name in given and given[name] not in (None, 0.0):
                raise UnsupportedError(f"{name} in a call in diffusers' signature", remedy="Leave it out.")
        if given["output_type"] not in ("pil", "np", "pt", "latent"):
            raise ArgumentError(f"output_type is {given['output_type']!r}", expected="pil, np, pt or latent")
        tensors = list(given["callback_on_step_end_tensor_inputs"] or [])
        if set(tensors) - {"latents"}:
            raise UnsupportedError(f"callback_on_step_end_tensor_inputs {tensors}", expected="latents alone")

    def _request(self, given: Mapping[str, Any]) -> tuple[Request, list[tuple[Any, Gaussians]]]:
        """The request of a call, and the torch generators with what draws in their place."""
        config = self._bundle.component("unet").config
        factor = self._bundle.latent.factor
        explicit = given["timesteps"] is not None or given["sigmas"] is not None
        asked: dict[str, Any] = {
            "negative": given["negative_prompt"],
            "steps": None if explicit else given["num_inference_steps"],  # diffusers lets the others overrule it
            "timesteps": given["timesteps"],
            "sigmas": given["sigmas"],
            "guidance": given["guidance_scale"],
            "images_per_prompt": given["num_images_per_prompt"],
            "clip_skip": given["clip_skip"] or 0,
            **{k: given[k] for k in (*_EMBEDS, *(_POOLED if self.BIG else ()))},
        }
        if given["eta"] and "eta" in step_options(self._bundle.scheduler):
            asked["eta"] = given["eta"]
        if given.get("latents") is not None:
            asked["latents"] = given["latents"]
        side = int(config.get("sample_size") or 64) * factor
        size = (given.get("width") or side, given.get("height") or side)
        if self.task != "text":
            pictures = _pictures("image", given["image"])
            asked |= {"image": pictures, "strength": given["strength"]}
            if self.task == "image":
                size = (pictures[0].width // factor * factor, pictures[0].height // factor * factor)
            else:
                asked["mask"] = _pictures("mask_image", given["mask_image"])
        if self.BIG:
            asked |= {"prompt_2": given["prompt_2"], "negative_2": given["negative_prompt_2"]}
            asked |= self._sizes(given)
        shared, own = _noise(given["generator"])
        asked |= {"size": size, "shared_stream": shared}
        prompts = given["prompt"] if given["prompt_embeds"] is None else given["prompt_embeds"]
        images = (1 if isinstance(prompts, str) or prompts is None else len(prompts)) * given["num_images_per_prompt"]
        if own and not shared and len(own) != images:
            raise ArgumentError(f"{len(own)} generators for {images} images", expected="one an image, or one for all")
        request = make_request(self._bundle, given["prompt"], **asked, **_seeds(own))
        generators = tuple(ours for _, ours in own)
        request = replace(request, generators=generators or None, first_draws=self.task == "inpaint")
        return request, [(theirs, ours) for theirs, ours in own if is_generator(theirs)]

    def _sizes(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """diffusers' (height, width) as ours, and what each of its pipelines makes of the negative ones."""
        negative = {f"negative_{n}": given[f"negative_{n}"] for n in ("original_size", "target_size")}
        crop = given["negative_crops_coords_top_left"]
        if self.task != "text":
            crop = given["crops_coords_top_left"]  # diffusers reads the other one here
        elif None in negative.values():
            negative, crop = dict.fromkeys(negative), None
        sizes = {"original_size": given["original_size"], "target_size": given["target_size"], **negative}
        return {
            **{k: None if v is None else tuple(v)[::-1] for k, v in sizes.items()},
            "crop_top_left": tuple(given["crops_coords_top_left"]),
            "negative_crop_top_left": None if crop is None else tuple(crop),
        }

    def _run(self, request: Request, given: Mapping[str, Any]) -> Result:
        callback = given["callback_on_step_end"]
        with_latents = "latents" in (given["callback_on_step_end_tensor_inputs"] or ())
        on_step = None if callback is None else lambda step: self._tell(callback, step, with_latents=with_latents)
        return self.pipeline.run(request, on_step=on_step)

    def _tell(self, callback: Any, step: Step, *, with_latents: bool) -> None:
        """Call back after an evaluation; what it gives back may look at the latents and not replace them."""
        handed = {"latents": _tensor(step.latents())} if with_latents else {}
        before = np.array(handed["latents"]) if with_latents else None
        answer = callback(self, step.index, step.timestep, dict(handed))
        if not isinstance(answer, Mapping):
            raise ArgumentError(f"the callback returned {type(answer).__name__}", expected="its dictionary")
        if with_latents and not np.array_equal(np.asarray(answer.get("latents", before)), np.asarray(before)):
            raise UnsupportedError("a callback that changes the latents", expected="one that looks at them")


def _noise(generator: Any) -> tuple[bool, list[tuple[Any, Gaussians]]]:
    """Whether the batch shares one stream, and each generator (or seed) with what draws in its place."""
    if generator is None:
        return False, []
    one = not isinstance(generator, (list, tuple))
    sources: list[tuple[Any, Gaussians]] = []
    for each in [generator] if one else generator:
        if isinstance(each, int) and not isinstance(each, bool):
            sources.append((each, TorchCpuGenerator(each)))
        elif is_generator(each):
            sources.append((each, read_generator(each)))
        else:
            raise ArgumentError(f"a generator is {type(each).__name__}", expected="torch.Generator or an integer")
    return one, sources


def _seeds(own: Sequence[tuple[Any, Gaussians]]) -> dict[str, Any]:
    """Seeds for the pictures' parameters."""
    seeds = [each if isinstance(each, int) else seed_of(each) for each, _ in own]
    return {} if not seeds else {"seed": seeds[0] if len(seeds) == 1 else seeds}


def _pictures(name: str, given: Any) -> list[Any]:
    """Pillow images, one or several, as their pixels lie: diffusers turns them in `load_image` and nowhere else."""
    from PIL import Image as pillow

    pictures = list(given) if isinstance(given, (list, tuple)) else [given]
    if not pictures or not all(isinstance(p, pillow.Image) for p in pictures):
        kinds = ", ".join(sorted({type(p).__name__ for p in pictures})) or "nothing"
        raise UnsupportedError(f"{name} is {kinds}", expected="a Pillow image, or a list of them")
    return [as_stored(p) for p in pictures]


def _tensor(array: np.ndarray[Any, Any]) -> Any:
    """A torch tensor where the caller has torch loaded, else the array."""
    torch = sys.modules.get("torch")
    return array if torch is None else torch.from_numpy(array)


def _images(result: Result, output_type: str) -> Any:
    if output_type == "pil":
        return result.to_pil()
    if output_type == "latent":
        return _tensor(result.latents)
    floats = result.images.astype(np.float32) / np.float32(255.0)
    return floats if output_type == "np" else _tensor(np.ascontiguousarray(floats.transpose(0, 3, 1, 2)))


class StableDiffusionPipeline(DiffusersPipeline):
    """Text to image, SD 1.x and 2.x: diffusers' signature of that name."""

    ARGUMENTS: ClassVar[Mapping[str, Any]] = {
        **_PROMPTS, **_SIZE, **_STEPS, "guidance_scale": 7.5, **_NEGATIVE, **_NOISE, "latents": None, **_EMBEDS,
        **_ADAPTERS, **_OUTPUT, "guidance_rescale": 0.0, "clip_skip": None, **_CALLBACK,
    }  # fmt: skip


class StableDiffusionImg2ImgPipeline(DiffusersPipeline):
    """Image to image, SD 1.x and 2.x: diffusers' signature of that name."""

    task = "image"
    ARGUMENTS: ClassVar[Mapping[str, Any]] = {
        **_PROMPTS, "image": None, "strength": 0.8, **_STEPS, "guidance_scale": 7.5, **_NEGATIVE, **_NOISE, **_EMBEDS,
        **_ADAPTERS, **_OUTPUT, "clip_skip": None, **_CALLBACK,
    }  # fmt: skip


class StableDiffusionInpaintPipeline(DiffusersPipeline):
    """Inpainting, SD 1.x and 2.x with four channels: diffusers' signature of that name."""

    task = "inpaint"
    ARGUMENTS: ClassVar[Mapping[str, Any]] = {
        **_PROMPTS, **_MASK, **_SIZE, "padding_mask_crop": None, "strength": 1.0, **_STEPS, "guidance_scale": 7.5,
        **_NEGATIVE, **_NOISE, "latents": None, **_EMBEDS, **_ADAPTERS, **_OUTPUT, "clip_skip": None, **_CALLBACK,
    }  # fmt: skip


class StableDiffusionXLPipeline(DiffusersPipeline):
    """Text to image, SDXL: diffusers' signature of that name."""

    BIG = True
    ARGUMENTS: ClassVar[Mapping[str, Any]] = {
        **_PROMPTS, **_SECOND, **_SIZE, **_STEPS, "denoising_end": None, "guidance_scale": 5.0, **_NEGATIVE,
        "negative_prompt_2": None, **_NOISE, "latents": None, **_EMBEDS, **_POOLED, **_ADAPTERS, **_OUTPUT,
        "guidance_rescale": 0.0, **_SIZES, "clip_skip": None, **_CALLBACK,
    }  # fmt: skip


class StableDiffusionXLImg2ImgPipeline(DiffusersPipeline):
    """Image to image, SDXL: diffusers' signature of that name."""

    BIG = True
    task = "image"
    ARGUMENTS: ClassVar[Mapping[str, Any]] = {
        **_PROMPTS, **_SECOND, "image": None, "strength": 0.3, **_STEPS, "denoising_start": None,
        "denoising_end": None, "guidance_scale": 5.0, **_NEGATIVE, "negative_prompt_2": None, **_NOISE,
        "latents": None, **_EMBEDS, **_POOLED, **_ADAPTERS, **_OUTPUT, "guidance_rescale": 0.0, **_SIZES, **_SCORES,
        "clip_skip": None, **_CALLBACK,
    }  # fmt: skip


class StableDiffusionXLInpaintPipeline(DiffusersPipeline):
    """Inpainting, SDXL with four channels: diffusers' signature of that name."""

    BIG = True
    task = "inpaint"
    ARGUMENTS: ClassVar[Mapping[str, Any]] = {
        **_PROMPTS, **_SECOND, **_MASK, **_SIZE, "padding_mask_crop": None, "strength": 0.9999, **_STEPS,
        "denoising_start": None, "denoising_end": None, "guidance_scale": 7.5, **_NEGATIVE, "negative_prompt_2": None,
        **_NOISE, "latents": None, **_EMBEDS, **_POOLED, **_ADAPTERS, **_OUTPUT, "guidance_rescale": 0.0, **_SIZES,
        **_SCORES, "clip_skip": None, **_CALLBACK,
    }  # fmt: skip


def _signature(arguments: Mapping[str, Any]) -> inspect.Signature:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    named = [inspect.Parameter(n, kind, default=v) for n, v in arguments.items()]
    return inspect.Signature([inspect.Parameter("self", kind), *named])


PIPELINES = (
    StableDiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
_SIGNATURES: dict[type[DiffusersPipeline], inspect.Signature] = {c: _signature(c.ARGUMENTS) for c in PIPELINES}
