"""Stable Diffusion 1.x and 2.x: one text encoder, OpenAI's CLIP or OpenCLIP's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .base import TEXT_KEYS, Config, Family, FamilyPart, TextEncoder, register_family


@dataclass(frozen=True, slots=True, kw_only=True)
class StableDiffusion(Family):
    """The two are told apart by their text encoders' activation."""

    activation: str

    def recognises(self, configs: Mapping[str, Config]) -> bool:
        activation = configs.get("text_encoder", {}).get("hidden_act")
        return (activation == "gelu") == (self.activation == "gelu")


_PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "LatentConsistencyModelPipeline",
)
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
        text_encoders=(_ENCODER,),
        text_width=768,
        activation="quick_gelu",
    )
)
register_family(
    StableDiffusion(
        name="sd2", title="SD 2.x", pipelines=_PIPELINES, text_encoders=(_ENCODER,), text_width=1024, activation="gelu"
    )
)
