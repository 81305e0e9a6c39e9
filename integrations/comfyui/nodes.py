"""ComfyUI's nodes: load, LoRA, schedule, sample, decode.

Pictures are IMAGE, torch float32 [B, H, W, 3] from 0 to 1. Latents are ComfyUI's LATENT, `{"samples": [B, 4, h, w]}` in
the VAE's own scale, so that its core's nodes decode, save and enlarge them too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ...bundle import Bundle
from ...errors import ArgumentError, FewstepError
from ...families.base import VAE_SCALING
from ...values import parse_json
from ..bundles import bundle_of
from .preview import report_steps

if TYPE_CHECKING:
    from ...runtime.arrays import Float32
    from ...runtime.pipeline import Pipeline

CATEGORY = "fewstep"
PIPELINE, SCHEDULE = "FEWSTEP_PIPELINE", "FEWSTEP_SCHEDULE"
MOST_PIPELINES = 2
"""That stay loaded when a prompt is queued again."""
LARGEST_SEED = 0xFFFFFFFFFFFFFFFF
Inputs = dict[str, dict[str, tuple[Any, ...]]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadedModel:
    """What a pipeline's socket carries: the pipeline, and the LoRAs that its pictures are made with."""

    pipeline: Pipeline
    loras: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@lru_cache(maxsize=MOST_PIPELINES)
def _load(bundle: str, backend: str) -> Pipeline:
    from ...runtime import load

    return load(bundle_of(bundle, backend), backend=backend)


class FewstepLoad:
    """A bundle's engines: a folder, or `student` or `base`, the embedded models."""

    CATEGORY, FUNCTION = CATEGORY, "load"
    RETURN_TYPES, RETURN_NAMES = (PIPELINE,), ("pipeline",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        from ...engines import backend_names

        return {
            "required": {
                "bundle": ("STRING", {"default": "student"}),
                "backend": (["auto", *backend_names()], {"default": "auto"}),
            }
        }

    def load(self, bundle: str, backend: str) -> tuple[LoadedModel]:
        return (LoadedModel(pipeline=_load(bundle, backend)),)


class FewstepLora:
    """One more LoRA for what a pipeline makes; no weight is touched."""

    CATEGORY, FUNCTION = CATEGORY, "add"
    RETURN_TYPES, RETURN_NAMES = (PIPELINE,), ("pipeline",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        strength = {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01}
        return {
            "required": {
                "pipeline": (PIPELINE,),
                "file": ("STRING", {"default": ""}),
                "strength_model": ("FLOAT", strength),
                "strength_clip": ("FLOAT", strength),
            }
        }

    def add(self, pipeline: LoadedModel, file: str, strength_model: float, strength_clip: float) -> tuple[LoadedModel]:
        encoders = pipeline.pipeline.bundle.text_encoders
        scales = {"unet": strength_model, **dict.fromkeys(encoders, strength_clip)}
        return (replace(pipeline, loras={**pipeline.loras, file: scales}),)


class FewstepSchedule:
    """Sampler, schedule and steps; what is empty, or 0 steps, is the bundle's own."""

    CATEGORY, FUNCTION = CATEGORY, "choose"
    RETURN_TYPES, RETURN_NAMES = (SCHEDULE,), ("schedule",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        from ...schedules.solvers.registry import SAMPLERS
        from ...schedules.spacing import SPACINGS

        return {
            "required": {
                "sampler": (["", *SAMPLERS],),
                "schedule": (["", *SPACINGS],),
                "steps": ("INT", {"default": 0, "min": 0, "max": 1000}),
            },
            "optional": {"options": ("STRING", {"default": "{}"})},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, sampler: str, schedule: str) -> bool | str:
        """Whether any of the four families' names is one, and not only those of the list."""
        from ...schedules.names import resolve_sampler, resolve_schedule

        try:
            if sampler:
                resolve_sampler(sampler)
            if schedule:
                resolve_schedule(schedule)
        except FewstepError as error:
            return str(error)
        return True

    def choose(self, sampler: str, schedule: str, steps: int, options: str = "{}") -> tuple[dict[str, Any]]:
        given = {"sampler": sampler or None, "schedule": schedule or None, "steps": steps or None}
        return ({**{k: v for k, v in given.items() if v is not None}, **_mapping("options", options)},)


class FewstepSample:
    """Latents of a prompt; from a latent with a denoise below 1, as the core's sampler."""

    CATEGORY, FUNCTION = CATEGORY, "sample"
    RETURN_TYPES, RETURN_NAMES = ("LATENT",), ("samples",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        side = {"default": 512, "min": 8, "max": 16384, "step": 8}
        text = {"default": "", "multiline": True}
        return {
            "required": {
                "pipeline": (PIPELINE,),
                "prompt": ("STRING", text),
                "negative": ("STRING", text),
                "seed": ("INT", {"default": 0, "min": 0, "max": LARGEST_SEED, "control_after_generate": True}),
                "guidance": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 1000.0, "step": 0.1}),
                "width": ("INT", side),
                "height": ("INT", side),
                "batch_size": ("INT", {"default": 1, "min": 1, "max": 1024}),
                "denoise": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01}),
            },
            "optional": {
                "schedule": (SCHEDULE,),
                "latent": ("LATENT",),
                "arguments": ("STRING", {"default": "{}"}),
            },
        }

    def sample(
        self,
        pipeline: LoadedModel,
        prompt: str,
        negative: str,
        seed: int,
        guidance: float,
        width: int,
        height: int,
        batch_size: int,
        denoise: float,
        schedule: Mapping[str, Any] | None = None,
        latent: Mapping[str, Any] | None = None,
        arguments: str = "{}",
    ) -> tuple[dict[str, Any]]:
        import torch

        pipe = pipeline.pipeline
        given: dict[str, Any] = {"seed": seed, "guidance": guidance, "images_per_prompt": batch_size}
        given |= {"negative": negative} if negative else {}
        given |= {"loras": dict(pipeline.loras)} if pipeline.loras else {}
        given |= {**(schedule or {}), **_mapping("arguments", arguments)}
        if latent is None and denoise < 1.0:
            raise ArgumentError(f"denoise {denoise:g} without a latent", expected="a latent to begin with, or 1")
        if latent is None:
            request = pipe.request(prompt, size=(width, height), **given)
        else:
            begin = _to_scale(pipe.bundle, np.asarray(latent["samples"].detach().cpu(), np.float32))
            if len(begin) not in (1, batch_size):
                raise ArgumentError(f"{len(begin)} latents for {batch_size} images", expected="one, or one an image")
            high, wide = (side * pipe.bundle.latent.factor for side in begin.shape[2:])
            blank = np.zeros((high, wide, 3), np.uint8)
            request = pipe.request(prompt, size=(wide, high), image=blank, strength=denoise, **given)
            shape = (request.images, *begin.shape[1:])
            request = replace(request, start_latents=np.ascontiguousarray(np.broadcast_to(begin, shape)))
        result = pipe.run(request, on_step=report_steps(request.program.evaluations))
        return ({"samples": torch.from_numpy(_from_scale(pipe.bundle, result.latents))},)


class FewstepDecode:
    """Pictures of latents, by the bundle's own decoder."""

    CATEGORY, FUNCTION = CATEGORY, "decode"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE",), ("images",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"pipeline": (PIPELINE,), "samples": ("LATENT",)}}

    def decode(self, pipeline: LoadedModel, samples: Mapping[str, Any]) -> tuple[Any]:
        import torch

        pipe = pipeline.pipeline
        latents = _to_scale(pipe.bundle, np.asarray(samples["samples"].detach().cpu(), np.float32))
        images = pipe.vae.decode(latents)
        return (torch.from_numpy(images.astype(np.float32) / np.float32(255.0)),)


def _scaling(bundle: Bundle) -> tuple[Float32, Float32]:
    """Factor [C, 1, 1] and shift of the UNet's latents that make them the VAE's own."""
    config = bundle.component("vae_decoder").config
    mean, std = (
        np.asarray(config.get(name) or [usual], np.float32)[:, None, None]
        for name, usual in (("latents_mean", config.get("shift_factor") or 0.0), ("latents_std", 1.0))
    )
    return std / np.float32(config.get("scaling_factor") or VAE_SCALING), mean


def _to_scale(bundle: Bundle, samples: Float32) -> Float32:
    """ComfyUI's latents as the UNet has them."""
    factor, shift = _scaling(bundle)
    channels = bundle.latent.channels
    if samples.ndim != 4 or samples.shape[1] != channels:
        raise ArgumentError(f"the latent has shape {list(samples.shape)}", expected=f"[B, {channels}, h, w]")
    return (samples - shift) / factor


def _from_scale(bundle: Bundle, latents: Float32) -> Float32:
    factor, shift = _scaling(bundle)
    return latents * factor + shift


def _mapping(name: str, text: str) -> dict[str, Any]:
    """A JSON object that a text holds; nothing for an empty one."""
    data = parse_json(text or "{}", f"the node's {name}")
    if not isinstance(data, dict):
        raise ArgumentError(f"{name} is {json.dumps(data)[:60]}", expected='an object like {"eta": 0.5}')
    return dict(data)


NODE_CLASS_MAPPINGS: dict[str, type] = {
    c.__name__: c for c in (FewstepLoad, FewstepLora, FewstepSchedule, FewstepSample, FewstepDecode)
}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {
    "FewstepLoad": "Load bundle (fewstep)",
    "FewstepLora": "LoRA (fewstep)",
    "FewstepSchedule": "Sampler and schedule (fewstep)",
    "FewstepSample": "Sample (fewstep)",
    "FewstepDecode": "Decode (fewstep)",
}
