"""The last stage of a request on a device: latents decoded, and what comes of them read back."""

from __future__ import annotations

import torch

from ...engines import Binding, Engine
from .base import Decoded
from .memory import as_tensor, fetch, on_host


class Decoder:
    """A VAE's decoder bound to so many images, with what is read back of them beside it on the host."""

    def __init__(self, engine: Engine, images: int, sides: dict[str, int]) -> None:
        self.engine, self.images = engine, images
        self.binding: Binding = engine.bind({"batch": images, **sides})
        self.latent, self.image = as_tensor(self.binding.inputs["latent"]), as_tensor(self.binding.outputs["image"])
        self._finite = as_tensor(self.binding.outputs["finite"])
        self._fetched = [on_host(t) for t in (self.image, self.latent, self._finite, self._finite)]

    def serves(self, engine: Engine, images: int) -> bool:
        return self.engine is engine and self.images == images

    def run(self, latents: torch.Tensor) -> None:
        """Decode latents [A, C, h, w], and read back what comes of it."""
        self.latent.copy_(latents)
        self.binding.enqueue()
        finite = torch.isfinite(latents).flatten(1).all(1)
        for target, source in zip(self._fetched, (self.image, self.latent, self._finite, finite), strict=True):
            fetch(target, source)

    def taken(self, tensor: torch.Tensor) -> Decoded:
        """What was read back, once it is there; tensor: the images where they were made."""
        images, latents, *finite = (t.numpy().copy() for t in self._fetched)
        return Decoded(images=images, latents=latents, finite=finite[0] & finite[1], tensor=tensor)
