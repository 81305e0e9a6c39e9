"""What a request needs before its first evaluation: prompts encoded, noise drawn, a picture turned into latents."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..bundle import Bundle
from ..errors import ArgumentError
from .conditioning import condition, guidance_vector
from .images import open_image, to_unit
from .request import Request
from .seeds import RequestNoise, request_noise
from .slots import Float32, Tenant
from .text import Embedding, TextEncoders
from .vae import Vae


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


def prepare(bundle: Bundle, text: TextEncoders, vae: Vae, request: Request, image: Any = None) -> Prepared:
    """Encode the prompts and the picture, and draw the noise, in the order in which diffusers draws it."""
    if request.has_image != (image is not None):
        raise ArgumentError(
            f"the request was made {'with' if request.has_image else 'without'} an image and runs "
            f"{'without' if request.has_image else 'with'} one",
            remedy="Give the same image to request(...) and to stream(...).",
        )
    began = time.perf_counter()
    given = None if image is None else to_unit(open_image(image), request.width, request.height)
    positives, negatives = condition(bundle, text, request)
    encoded = time.perf_counter()
    noise = request_noise(request.seeds, shared=request.shared_stream)
    shape = latent_shape(bundle, request)
    latents = None if given is None else vae.encode(given, noise, shape)
    return Prepared(
        request=request,
        tenants=_tenants(bundle, request, positives, negatives, noise),
        gaussians=np.stack([member.randn(shape) for member in noise.members]),
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
        )
        for member, p, n in zip(noise.members, positives, negatives, strict=True)
    )
