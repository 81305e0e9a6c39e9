"""What a request needs before its first evaluation: prompts encoded, noise drawn, a picture turned into latents."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..bundle import Bundle
from .conditioning import condition, guidance_vector
from .device.numpy_slots import Float32, Tenant
from .noise.seeds import RequestNoise, request_noise
from .pictures.inpaint import Blend, make_blend
from .pictures.vae import Vae
from .prompts.encoders import Embedding, TextEncoders
from .request import Request


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prepared:
    """A request that is ready for slots, one entry an image.

    gaussians: unit noise to start from, float32 [B, C, h, w]. latents: of the picture it starts from, float32
    [B, C, h, w], or `None`. text_ms, encode_image_ms: what preparing took.
    """

    request: Request
    tenants: tuple[Tenant, ...]
    gaussians: Float32
    latents: Float32 | None
    text_ms: float
    encode_image_ms: float

    @property
    def truncated(self) -> tuple[bool, ...]:
        """By image, whether tokens of its prompt or negative prompt were cut off."""
        return tuple(t.positive.truncated or (t.negative is not None and t.negative.truncated) for t in self.tenants)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, h, w) of a latent."""
        _, channels, height, width = self.gaussians.shape
        return channels, height, width


def prepare(bundle: Bundle, text: TextEncoders, vae: Vae, request: Request) -> Prepared:
    """Encode the prompts and the pictures, and draw the noise, in the order in which diffusers draws it."""
    began = time.perf_counter()
    positives, negatives = condition(bundle, text, request)
    encoded = time.perf_counter()
    noise = request_noise(
        request.seeds,
        shared=request.shared_stream,
        device=request.seed_device,
        generators=request.generators,
        first_draws=request.first_draws,
    )
    shape = latent_shape(bundle, request)
    pictures = request.pictures
    latents = None if pictures is None else vae.encode(pictures.pixels, noise, shape)
    gaussians = request.gaussians
    if gaussians is None:
        gaussians = np.stack([member.randn(shape) for member in noise.members])
    blends: list[Blend | None] = [None] * request.images
    if pictures is not None and pictures.masks is not None and latents is not None:
        noise.draw_for_pictures(len(pictures.pixels), shape)  # diffusers encodes the masked picture too
        masks = np.broadcast_to(pictures.masks, (request.images, *pictures.masks.shape[1:]))
        blends = [make_blend(m, z, n) for m, z, n in zip(masks, latents, gaussians, strict=True)]
    return Prepared(
        request=request,
        tenants=_tenants(bundle, request, positives, negatives, noise, blends),
        gaussians=gaussians,
        latents=latents,
        text_ms=1e3 * (encoded - began),
        encode_image_ms=1e3 * (time.perf_counter() - encoded),
    )


def latent_shape(bundle: Bundle, request: Request) -> tuple[int, int, int]:
    """(C, h, w) of the request's latents."""
    latent = bundle.latent
    return latent.channels, request.height // latent.factor, request.width // latent.factor


def _tenants(
    bundle: Bundle,
    request: Request,
    positives: Sequence[Embedding],
    negatives: Sequence[Embedding | None],
    noise: RequestNoise,
    blends: Sequence[Blend | None],
) -> tuple[Tenant, ...]:
    sizes = request.sizes
    vector = guidance_vector(bundle, request)
    return tuple(
        Tenant(
            program=request.program,
            noise=member,
            positive=p,
            negative=n,
            guidance=request.guidance,
            time_ids=None if sizes is None else sizes.positive,
            negative_time_ids=None if sizes is None else sizes.negative,
            guidance_vector=vector,
            blend=blend,
        )
        for member, p, n, blend in zip(noise.members, positives, negatives, blends, strict=True)
    )
