"""Stable Diffusion 1.x and 2.x: one text encoder, OpenAI's CLIP or OpenCLIP's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .base import TEXT_KEYS, Config, Family, FamilyPart, TextEncoder, register_family


@dataclass(frozen=True, slots=True, kw_only=True)
class StableDiffusion(Family):
    """The two are told apart by their text encoders' activation."""

    activation: str

    def recognises(self, configs: Mapping[str, Config]) -> bool:
        activation = configs.get("text_encoder", {}).get("hidden_act")
        return (activation == "gelu") == (self.activation == "gelu")

    def part_refusal(self, name: str, config: Config) -> str | None:
        if name == _ENCODER.name and config.get("use_attention_mask"):
            return "masks its prompts' padding (use_attention_mask)"
        return None

    def loaded_scheduler(self, pipeline: str, config: Config) -> dict[str, Any]:
        """The constructors take any `steps_offset` for 1 and `clip_sample` for false, whether stated or by default.

        That of inpainting turns PNDM's Runge-Kutta steps off besides; that of latent consistency models does nothing.
        """
        if pipeline in _CONSISTENCY:
            return dict(config)
        scheduler = config.get("_class_name")
        corrections: dict[str, Any] = {}
        if config.get("steps_offset", 1 if scheduler in _WITHOUT_OFFSET else 0) != 1:
            corrections["steps_offset"] = 1
        if config.get("clip_sample", scheduler in _CLIPPING) is True:
            corrections["clip_sample"] = False
        if pipeline == _INPAINT and config.get("skip_prk_steps", scheduler != "PNDMScheduler") is False:
            corrections["skip_prk_steps"] = True
        unstated = sorted(corrections.keys() - config.keys())
        return {**config, **corrections, **({"_use_default_values": unstated} if unstated else {})}

    def loaded_unet(self, pipeline: str, config: Config) -> dict[str, Any]:
        """A `sample_size` below 64 that was written before diffusers 0.9 is taken for 64."""
        size, written = config.get("sample_size"), _VERSION.match(str(config.get("_diffusers_version", "")))
        old = written is not None and tuple(map(int, written.groups("0"))) < (0, 9)
        if pipeline not in _CONSISTENCY and old and isinstance(size, int) and size < 64:
            return {**config, "sample_size": 64}
        return dict(config)


_INPAINT = "StableDiffusionInpaintPipeline"
_CONSISTENCY = ("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline")
_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", _INPAINT, *_CONSISTENCY)
_CLIPPING = ("DDIMScheduler", "DDPMScheduler")
"""diffusers' schedulers that clip unless they are told not to."""
_WITHOUT_OFFSET = ("DPMSolverSinglestepScheduler", "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
"""Those that know no `steps_offset`."""
_VERSION = re.compile(r"(\d+)(?:\.(\d+))?")
_ENCODER = TextEncoder(
    name="text_encoder",
    tokenizer="tokenizer",
    part=FamilyPart(classes={"CLIPTextModel": TEXT_KEYS}),
    prefixes=("cond_stage_model.transformer.", "cond_stage_model.model."),
    lora=("lora_te_", "lora_te1_"),
)

register_family(
    StableDiffusion(
        name="sd1",
        title="SD 1.x",
        pipelines=_PIPELINES,
        respacing=_CONSISTENCY,
        text_encoders=(_ENCODER,),
        text_width=768,
        activation="quick_gelu",
    )
)
register_family(
    StableDiffusion(
        name="sd2",
        title="SD 2.x",
        pipelines=_PIPELINES,
        respacing=_CONSISTENCY,
        text_encoders=(_ENCODER,),
        text_width=1024,
        activation="gelu",
    )
)
