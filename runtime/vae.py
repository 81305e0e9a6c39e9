"""The autoencoder at run time: latents to pixels with guards against broken images, pictures to latents."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from ..bundle import Bundle
from ..engines.base import Binding, Engine
from ..errors import BlackImageError, NonFiniteError
from .images import Float32, UInt8
from .seeds import RequestNoise

MOST_PIXELS = 1024 * 1024
KEPT_BINDINGS = 4


class Vae:
    """Decodes and encodes; the encoder is opened when it is first needed. Thread-safe: one batch at a time."""

    def __init__(self, bundle: Bundle, decoder: Engine, open_encoder: Callable[[], Engine]) -> None:
        self._factor = bundle.latent.factor
        self._decoder, self._open_encoder = decoder, open_encoder
        self._encoder: Engine | None = None
        self._bindings: dict[tuple[str, int, int, int], Binding] = {}
        self._lock = threading.Lock()

    def decode(self, latents: Float32) -> UInt8:
        """Latents float32 [B, C, h, w] to images uint8 [B, H, W, 3].

        Raises `NonFiniteError` for NaN or infinity before the clamp, `BlackImageError` for an image all of zeros.
        """
        images, finite = self._decode(latents)
        check_images(images, finite)
        return images

    def decode_unguarded(self, latents: Float32) -> UInt8:
        """As `decode`, for previews: whatever comes out is returned."""
        return self._decode(latents)[0]

    def _decode(self, latents: Float32) -> tuple[UInt8, np.ndarray]:
        count, _, height, width = latents.shape
        images = np.empty((count, height * self._factor, width * self._factor, 3), np.uint8)
        finite = np.empty(count, bool)
        each = max(1, MOST_PIXELS // (height * width * self._factor**2))
        with self._lock:
            for at in range(0, count, each):
                part = latents[at : at + each]
                binding = self._binding("decoder", len(part), height, width)
                np.copyto(binding.inputs["latent"], part)
                binding.enqueue()
                images[at : at + each] = binding.outputs["image"]
                finite[at : at + each] = binding.outputs["finite"]
        return images, finite

    def encode(self, pictures: Float32, noise: RequestNoise, shape: tuple[int, int, int]) -> Float32:
        """Pictures float32 [n, 3, H, W] in [-1, 1], one for all or one an image, to latents float32 [B, C, h, w].

        Each image draws its own sample of the latent's distribution, from its own seed and before its starting noise,
        as diffusers does; images that share a stream share the sample.
        """
        _, height, width = shape
        with self._lock:
            if self._encoder is None:
                self._encoder = self._open_encoder()
            binding = self._binding("encoder", 1, height, width)
            moments = []
            for picture in pictures:
                np.copyto(binding.inputs["image"][0], picture)
                binding.enqueue()
                moments.append((binding.outputs["mean"][0].copy(), binding.outputs["std"][0].copy()))
        draws = noise.draw_for_pictures(len(pictures), shape)
        each = [moments[i % len(moments)] for i in range(len(draws))]
        return np.stack([mean + std * d for (mean, std), d in zip(each, draws, strict=True)])

    def _binding(self, which: str, batch: int, height: int, width: int) -> Binding:
        key = (which, batch, height, width)
        if key not in self._bindings:
            engine = self._encoder if which == "encoder" and self._encoder is not None else self._decoder
            while len(self._bindings) >= KEPT_BINDINGS:
                self._bindings.pop(next(iter(self._bindings)))
            self._bindings[key] = engine.bind({"batch": batch, "height": height, "width": width})
        return self._bindings[key]


def check_images(images: UInt8, finite: np.ndarray) -> None:
    """Raise `NonFiniteError` unless every image was finite before the clamp, `BlackImageError` for one of zeros."""
    if not finite.all():
        raise NonFiniteError(
            f"the VAE gave NaN or infinity for image {int(np.flatnonzero(~finite)[0])}",
            remedy="Export it with --vae-precision float32 or bfloat16.",
        )
    for i, image in enumerate(images):
        if not image.any():
            raise BlackImageError(
                f"image {i} is black throughout", remedy="Export the VAE with --vae-precision float32."
            )
