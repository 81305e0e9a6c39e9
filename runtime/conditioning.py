"""What the UNet is told besides latent and timestep: prompts, sizes and crops, guidance as an embedding."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..bundle import Bundle
from .request import Request
from .text import Embedding, Float32, TextEncoders


def condition(
    bundle: Bundle, text: TextEncoders, request: Request
) -> tuple[list[Embedding], Sequence[Embedding | None]]:
    """Embeddings of the prompts and, where guidance needs them, of the negative prompts.

    A negative prompt that was not given is the empty prompt; in families that say so (SDXL's
    `force_zeros_for_empty_prompt`) it is zeros, as in diffusers.
    """
    if not request.guided or bundle.guidance_embedding:
        return text.encode(request.prompts), [None] * request.images
    encoded = text.encode([*request.prompts, *(n or "" for n in request.negatives)])
    positives, negatives = encoded[: request.images], encoded[request.images :]
    if bundle.force_zeros:
        negatives = [e.zeros() if given is None else e for e, given in zip(negatives, request.negatives, strict=True)]
    return positives, negatives


def size_and_crop(bundle: Bundle, request: Request) -> Float32 | None:
    """SDXL's conditioning, float32 [6]: original height and width, crop's top and left, target height and width."""
    if not any(s.name == "time_ids" for s in bundle.component("unet").inputs):
        return None
    size = [request.height, request.width]
    return np.array([*size, 0, 0, *size], np.float32)


def guidance_vector(bundle: Bundle, request: Request) -> Float32 | None:
    """The sinusoidal embedding of `guidance - 1` that LCM's full UNets take instead of a second row, float32 [E]."""
    if not bundle.guidance_embedding:
        return None
    half = bundle.guidance_embedding // 2
    rates = np.exp(-math.log(10_000.0) / (half - 1) * np.arange(half))
    angles = (request.guidance - 1.0) * 1000.0 * rates
    vector = np.concatenate([np.sin(angles), np.cos(angles)]).astype(np.float32)
    return np.pad(vector, (0, bundle.guidance_embedding - len(vector)))
