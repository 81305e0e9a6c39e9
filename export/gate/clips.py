"""A clip of diffusers' own pipeline, loaded by diffusers' own loaders: what the gate compares a bundle's clip with."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from ..checkpoint.parts import Checkpoint
from .loading import load_model
from .pictures import GUIDANCE, LEAST_SIDE, NOISE_DIFFERS, SEED, drawing, words_of

TASK = "image_to_video"
FRAMES, CHUNK, STEPS = 5, 3, 4
"""Two steps would go from a sigma of 700 to the picture at once, of which float32 leaves five digits."""
PIXELS = 8
"""What the pipeline asks of width and height, whatever its VAE does."""


def make_clips(checkpoint: Checkpoint) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors (`picture/image_to_video/in/image`, `.../out/frames` uint8 [F, H, W, 3]) and what was asked for.

    Where diffusers cannot make a clip that can be compared, `not_run` says why instead.
    """
    why = NOISE_DIFFERS.get(str(checkpoint.scheduler["_class_name"]))
    if why is not None:
        return {}, {TASK: {"not_run": why}}
    try:
        tensors, asked = _clip(checkpoint, load_video_diffusion(checkpoint))
    except Exception as error:  # whatever the library says of a checkpoint is recorded, and said
        return {}, {TASK: {"not_run": words_of(error)}}
    return {f"picture/{TASK}/{name}": value for name, value in tensors.items()}, {TASK: asked}


def load_video_diffusion(checkpoint: Checkpoint) -> Any:
    """The pipeline in float32; where the folder has no feature extractor, with CLIP's own numbers."""
    parts = {name: load_model(checkpoint, part) for name, part in checkpoint.parts.items()}
    place = checkpoint.folder / "feature_extractor"
    extractor = CLIPImageProcessor.from_pretrained(place) if place.is_dir() else CLIPImageProcessor()
    scheduler = getattr(diffusers, checkpoint.scheduler["_class_name"]).from_pretrained(checkpoint.folder / "scheduler")
    pipe = getattr(diffusers, checkpoint.pipeline)(**parts, scheduler=scheduler, feature_extractor=extractor)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _clip(checkpoint: Checkpoint, pipe: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    unet = checkpoint.parts["unet"].config
    _, factor, multiple = checkpoint.model.geometry(unet, checkpoint.parts["vae"].config)
    unit = math.lcm(multiple * factor, PIXELS)
    side = -(-LEAST_SIDE * factor // unit) * unit
    picture = drawing(side)
    frames = min(FRAMES, checkpoint.model.frames(unet))
    size = {"width": side + unit, "height": side}
    with torch.no_grad():
        made = pipe(
            Image.fromarray(picture),
            **size,
            num_frames=frames,
            num_inference_steps=STEPS,
            max_guidance_scale=GUIDANCE,
            decode_chunk_size=CHUNK,
            generator=torch.Generator().manual_seed(SEED),
            output_type="np",
        ).frames
    clip = np.asarray(made)[0]
    if not np.isfinite(clip).all():
        raise ValueError("its clip holds NaN")
    asked = {**size, "seed": SEED, "guidance": GUIDANCE, "steps": STEPS, "frames": frames, "decode_chunk": CHUNK}
    return {"in/image": picture, "out/frames": (clip * 255).round().astype(np.uint8)}, asked
