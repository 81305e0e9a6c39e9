"""What clips need before their first evaluation: the picture read by both encoders, and noise drawn."""

from __future__ import annotations

import time

import numpy as np

from ..bundle import Bundle
from ..errors import ArgumentError
from .arrays import Float32
from .clip import ClipTerms
from .conditioning import Conditioning
from .device.base import Sampling
from .noise.seeds import RequestNoise, request_noise
from .pictures.image_prompt import ImagePrompts
from .pictures.vae import Vae
from .prepare import Prepared, latent_shape
from .request import Request


def prepare_clips(bundle: Bundle, vae: Vae, encoder: ImagePrompts, request: Request) -> Prepared:
    """The request with its pictures encoded and noise drawn, in the order in which diffusers draws it."""
    began, terms, pictures = time.perf_counter(), request.clip, request.pictures
    if terms is None or pictures is None:
        raise ArgumentError("a request for pictures", expected="one for clips", remedy="Make it by Pipeline.request.")
    noise = request_noise(
        request.seeds, shared=request.shared_stream, device=request.seed_device, generators=request.generators
    )
    hidden = [bundle.model.join([encoder.outputs(p)]) for p in terms.pixels]
    latents = _shown_latents(vae, pictures.pixels, terms.noise_augmentation, noise)
    numbers = {n: getattr(terms, n) for n in ("fps", "motion_bucket", "noise_augmentation")}
    config = bundle.component("vae_encoder").config
    each = request.images // len(hidden)  # clips of one picture
    told = [bundle.model.clip_conditions(hidden[i // each], latents[i], numbers, config) for i in range(request.images)]
    shape = latent_shape(bundle, request)
    gaussians = request.gaussians
    if gaussians is None:
        gaussians = np.stack([member.randn(shape) for member in noise.members])
    return Prepared(
        request=request,
        samplings=tuple(
            Sampling(
                program=request.program,
                noise=n,
                conditioning=Conditioning(positive=told_of, negative=other if request.guided else None, tokens=1),
                guidance=_guidance(terms),
            )
            for n, (told_of, other) in zip(noise.members, told, strict=True)
        ),
        gaussians=gaussians,
        latents=None,
        truncated=(False,) * request.images,
        text_ms=0.0,
        encode_image_ms=1e3 * (time.perf_counter() - began),
    )


def _shown_latents(vae: Vae, pixels: Float32, amount: float, noise: RequestNoise) -> list[Float32]:
    """By clip, the latent [C, h, w] of its picture under noise: the mean, of which nothing is drawn."""
    draws = noise.draw_for_pictures(len(pixels), pixels.shape[1:])
    each = len(draws) // len(pixels)
    return [vae.encode_mean(pixels[i // each] + np.float32(amount) * d) for i, d in enumerate(draws)]


def _guidance(terms: ClipTerms) -> float | tuple[float, ...]:
    return terms.guidance[0] if len(set(terms.guidance)) == 1 else terms.guidance
