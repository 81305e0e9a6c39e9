"""Stable Video Diffusion: a clip from its first frame, which an image encoder reads and every frame is shown.

Blattmann et al. 2023, arXiv 2311.15127; as `StableVideoDiffusionPipeline` of diffusers puts the parts together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .base import (
    VAE_SCALING,
    Condition,
    Config,
    Family,
    FamilyPart,
    Float32,
    latent_multiple,
    register_family,
)
from .image_prompt import IMAGE_ENCODER, VISION_KEYS

UNET_CLASS, VAE_CLASS = "UNetSpatioTemporalConditionModel", "AutoencoderKLTemporalDecoder"
PICTURE_SIDE = 224
"""Pixels of a side of what the pipeline gives the image encoder, whatever that states."""
_NUMBERS = 3
_HIDDEN, _TIME_IDS, _LATENTS = "encoder_hidden_states", "added_time_ids", "image_latents"


@dataclass(frozen=True, slots=True, kw_only=True)
class StableVideoDiffusion(Family):
    """See the module."""

    def part_refusal(self, name: str, config: Config) -> str | None:
        if name == IMAGE_ENCODER and config.get("image_size") != PICTURE_SIDE:
            return f"takes pictures of {config.get('image_size')} pixels a side, and its pipeline gives {PICTURE_SIDE}"
        if name == "unet":
            if config["in_channels"] % 2:
                return f"takes {config['in_channels']} channels, no even number"
            fed, asked = _NUMBERS * config["addition_time_embed_dim"], config["projection_class_embeddings_input_dim"]
            if fed != asked:
                return f"asks for embeddings of {asked} values, and its pipeline feeds {fed}"
        return None

    def loaded_unet(self, pipeline: str, config: Config) -> dict[str, Any]:
        return {**config, "_class_name": UNET_CLASS}

    def loaded_vae(self, config: Config) -> dict[str, Any]:
        return {**Family.loaded_vae(self, config), "_class_name": VAE_CLASS}

    def latent_channels(self, unet: Config) -> int:
        """Half of what the UNet takes: the other half is the picture's latents."""
        return int(unet["in_channels"]) // 2

    def default_size(self, unet: Config, factor: int) -> tuple[int, int]:
        """The area of the UNet's `sample_size` at 16:9, which of the published 96 cells makes 1024x576."""
        size = unet.get("sample_size") or 96
        if not isinstance(size, int):
            return size[1] * factor, size[0] * factor
        multiple = latent_multiple(unet)
        wide, high = (max(1, round(size * share / multiple)) * multiple for share in (4 / 3, 3 / 4))
        return wide * factor, high * factor

    def conditions(self, unet: Config) -> tuple[Condition, ...]:
        width = unet["cross_attention_dim"]
        return (
            Condition(name=_HIDDEN, shape=(1, width if isinstance(width, int) else width[0])),
            Condition(name=_TIME_IDS, shape=(_NUMBERS,), example=(6.0, 127.0, 0.02)),
            Condition(name=_LATENTS, shape=(self.latent_channels(unet), "height", "width"), joined=True),
        )

    def join(self, outputs: Sequence[Mapping[str, Float32]]) -> dict[str, Float32]:
        return {_HIDDEN: outputs[0]["hidden"]}

    def clip_conditions(
        self, hidden: Mapping[str, Float32], latents: Float32, numbers: Mapping[str, float], vae: Config
    ) -> tuple[dict[str, Float32], dict[str, Float32]]:
        """The picture's latents are told as its VAE gives them, unscaled; frames per second as one less."""
        told = [numbers["fps"] - 1, numbers["motion_bucket"], numbers["noise_augmentation"]]
        shown = latents / np.float32(vae.get("scaling_factor", VAE_SCALING))
        positive = {**hidden, _LATENTS: shown}
        ids = {_TIME_IDS: np.array(told, np.float32)}
        return {**positive, **ids}, {**{n: np.zeros_like(a) for n, a in positive.items()}, **ids}


register_family(
    StableVideoDiffusion(
        name="svd",
        title="Stable Video Diffusion",
        pipelines=("StableVideoDiffusionPipeline",),
        clips=True,
        image_encoder=FamilyPart(classes={"CLIPVisionModelWithProjection": VISION_KEYS}),
        unet=FamilyPart(
            classes={
                UNET_CLASS: (
                    *("block_out_channels", "cross_attention_dim", "in_channels", "out_channels", "num_frames"),
                    *("addition_time_embed_dim", "projection_class_embeddings_input_dim"),
                )
            }
        ),
        vae=FamilyPart(classes={VAE_CLASS: ("block_out_channels", "latent_channels", "in_channels", "out_channels")}),
        schedule="ays_svd",
        guidance=3.0,
    )
)
