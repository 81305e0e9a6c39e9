"""Checkpoints that make clips, tiny and random, and what diffusers makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import BETAS, randomise
from diffusers import (
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

SCHEDULER = {
    **BETAS,
    "interpolation_type": "linear",
    "prediction_type": "v_prediction",
    "sigma_max": 700.0,
    "sigma_min": 0.002,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "timestep_type": "continuous",
    "use_karras_sigmas": True,
}
"""As both published checkpoints state it."""


def make_svd(folder: Path, *, seed: int = 50, vision: dict[str, Any] | None = None, **unet: Any) -> Path:
    """Widths are multiples of 32, since its groups' number is written into diffusers' classes."""
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1, sample_size=32
    )
    plain: dict[str, Any] = {
        "sample_size": 12,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24,
        "layers_per_block": 1,
        "cross_attention_dim": 24,
        "num_attention_heads": (2, 4),
        "num_frames": 14,
    }
    read: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 224,
        "patch_size": 56,
        "projection_dim": 24,
        "hidden_act": "gelu",
    }
    StableVideoDiffusionPipeline(
        vae=randomise(vae, seed),
        image_encoder=randomise(
            CLIPVisionModelWithProjection(CLIPVisionConfig(**{**read, **(vision or {})})), seed + 1
        ),
        unet=randomise(UNetSpatioTemporalConditionModel(**{**plain, **unet}), seed + 2),
        scheduler=EulerDiscreteScheduler(**SCHEDULER),
        feature_extractor=CLIPImageProcessor(),
    ).save_pretrained(folder)
    return folder


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Gradients, a disc and grain, RGB."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    disc = np.where((x - 0.5) ** 2 + (y - 0.3) ** 2 < 0.03, 220.0, 60.0)
    grain = np.random.default_rng(seed).normal(0, 12, (height, width, 3))
    return Image.fromarray(np.clip(np.stack([255 * x, 255 * y, disc], -1) + grain, 0, 255).astype(np.uint8))


@torch.no_grad()
def by_diffusers(pipe: Any, picture: Any, seeds: list[int] | int, **call: Any) -> np.ndarray:
    """float32 latents [B, F, C, h, w] where `output_type` says so, else frames uint8 [B, F, H, W, 3]."""
    pipe.set_progress_bar_config(disable=True)
    generator: Any = torch.Generator().manual_seed(seeds) if isinstance(seeds, int) else None
    if isinstance(seeds, list):
        generator = [torch.Generator().manual_seed(s) for s in seeds]
    made = pipe(picture, generator=generator, **{"output_type": "np", **call}).frames
    if call.get("output_type") == "latent":
        return np.asarray(made)
    assert made.std() > 0.02, "the reference shows nothing"
    return np.asarray((made * 255).round().astype(np.uint8))
