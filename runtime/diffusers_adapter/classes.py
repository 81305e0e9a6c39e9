"""The classes that diffusers has for the families here, with its signatures: arguments, order and defaults of 0.42."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from .base import DiffusionPipeline

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
_CONSISTENCY = {
    "num_inference_steps": 4,
    "original_inference_steps": None,
    "timesteps": None,
    "guidance_scale": 8.5,
    "num_images_per_prompt": 1,
    "generator": None,
    "latents": None,
    "prompt_embeds": None,
    **_ADAPTERS,
    **_OUTPUT,
    "clip_skip": None,
    **_CALLBACK,
}
_MASK = {"image": None, "mask_image": None, "masked_image_latents": None}
_CONTROL = {
    "controlnet_conditioning_scale": 1.0,
    "guess_mode": False,
    "control_guidance_start": 0.0,
    "control_guidance_end": 1.0,
}


class StableDiffusionPipeline(DiffusionPipeline):
    """Text to image, SD 1.x and 2.x: diffusers' signature of that name."""

    ARGUMENTS: ClassVar[Mapping[str, Any]] = {
        **_PROMPTS, **_SIZE, **_STEPS, "guidance_scale": 7.5, **_NEGATIVE, **_NOISE, "latents": None, **_EMBEDS,
        **_ADAPTERS, **_OUTPUT, "guidance_rescale": 0.0, "clip_skip": None, **_CALLBACK,
    }  # fmt: skip


class StableDiffusionImg2ImgPipeline(DiffusionPipeline):
    """Image to image, SD 1.x and 2.x: diffusers' signature of that name."""

    task = "image"
    ARGUMENTS: ClassVar[Mapping[str, Any]] = {
        **_PROMPTS, "image": None, "strength": 0.8, **_STEPS, "guidance_scale": 7.5, **_NEGATIVE, **_NOISE, **_EMBEDS,
        **_ADAPTERS, **_OUTPUT, "clip_skip": None, **_CALLBACK,
    }  # fmt: skip


class StableDiffusionInpaintPipeline(DiffusionPipeline):
    """Inpainting, SD 1.x and 2.x with four channels: diffusers' signature of that name."""

    task = "inpaint"
    ARGUMENTS: ClassVar[Mapping[str, Any]] = {
        **_PROMPTS, **_MASK, **_SIZE, "padding_mask_crop": None, "strength": 1.0, **_STEPS, "guidance_scale": 7.5,
        **_NEGATIVE, **_NOISE, "latents": None, **_EMBEDS, **_ADAPTERS, **_OUTPUT, "clip_skip": None, **_CALLBACK,
    }  # fmt: skip


class LatentConsistencyModelPipeline(DiffusionPipeline):
    """Text to image by models distilled with their guidance: diffusers' signature of that name."""

    ARGUMENTS: ClassVar[Mapping[str, Any]] = {**_PROMPTS, **_SIZE, **_CONSISTENCY}


class LatentConsistencyModelImg2ImgPipeline(DiffusionPipeline):
    """Image to image by the same models, all steps spaced by the strength: diffusers' signature of that name."""

    task = "image"
    ARGUMENTS: ClassVar[Mapping[str, Any]] = {
        **_PROMPTS, "image": None, "num_inference_steps": 4, "strength": 0.8, **_CONSISTENCY,
    }  # fmt: skip


class StableDiffusionControlNetPipeline(StableDiffusionPipeline):
    """Text to image under control, SD 1.x and 2.x: diffusers' signature of that name, on a bundle with ControlNets.

    Of several the pictures, scales and shares come in the order of their names.
    """

    task = "control"
    ARGUMENTS: ClassVar[Mapping[str, Any]] = {
        **_PROMPTS, "image": None, **_SIZE, **_STEPS, "guidance_scale": 7.5, **_NEGATIVE, **_NOISE, "latents": None,
        **_EMBEDS, **_ADAPTERS, **_OUTPUT, **_CONTROL, "clip_skip": None, **_CALLBACK,
    }  # fmt: skip


class StableDiffusionXLPipeline(DiffusionPipeline):
    """Text to image, SDXL: diffusers' signature of that name."""

    BIG = True
    ARGUMENTS: ClassVar[Mapping[str, Any]] = {
        **_PROMPTS, **_SECOND, **_SIZE, **_STEPS, "denoising_end": None, "guidance_scale": 5.0, **_NEGATIVE,
        "negative_prompt_2": None, **_NOISE, "latents": None, **_EMBEDS, **_POOLED, **_ADAPTERS, **_OUTPUT,
        "guidance_rescale": 0.0, **_SIZES, "clip_skip": None, **_CALLBACK,
    }  # fmt: skip


class StableDiffusionXLControlNetPipeline(StableDiffusionXLPipeline):
    """Text to image under control, SDXL: diffusers' signature of that name, on a bundle with ControlNets."""

    task = "control"
    ARGUMENTS: ClassVar[Mapping[str, Any]] = {
        **_PROMPTS, **_SECOND, "image": None, **_SIZE, **_STEPS, "denoising_end": None, "guidance_scale": 5.0,
        **_NEGATIVE, "negative_prompt_2": None, **_NOISE, "latents": None, **_EMBEDS, **_POOLED, **_ADAPTERS,
        **_OUTPUT, **_CONTROL, **_SIZES, "clip_skip": None, **_CALLBACK,
    }  # fmt: skip


class StableDiffusionXLImg2ImgPipeline(DiffusionPipeline):
    """Image to image, SDXL: diffusers' signature of that name."""

    BIG = True
    task = "image"
    ARGUMENTS: ClassVar[Mapping[str, Any]] = {
        **_PROMPTS, **_SECOND, "image": None, "strength": 0.3, **_STEPS, "denoising_start": None,
        "denoising_end": None, "guidance_scale": 5.0, **_NEGATIVE, "negative_prompt_2": None, **_NOISE,
        "latents": None, **_EMBEDS, **_POOLED, **_ADAPTERS, **_OUTPUT, "guidance_rescale": 0.0, **_SIZES, **_SCORES,
        "clip_skip": None, **_CALLBACK,
    }  # fmt: skip


class StableDiffusionXLInpaintPipeline(DiffusionPipeline):
    """Inpainting, SDXL with four channels: diffusers' signature of that name."""

    BIG = True
    task = "inpaint"
    ARGUMENTS: ClassVar[Mapping[str, Any]] = {
        **_PROMPTS, **_SECOND, **_MASK, **_SIZE, "padding_mask_crop": None, "strength": 0.9999, **_STEPS,
        "denoising_start": None, "denoising_end": None, "guidance_scale": 7.5, **_NEGATIVE, "negative_prompt_2": None,
        **_NOISE, "latents": None, **_EMBEDS, **_POOLED, **_ADAPTERS, **_OUTPUT, "guidance_rescale": 0.0, **_SIZES,
        **_SCORES, "clip_skip": None, **_CALLBACK,
    }  # fmt: skip


PIPELINES = (
    StableDiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    LatentConsistencyModelPipeline,
    LatentConsistencyModelImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
)
