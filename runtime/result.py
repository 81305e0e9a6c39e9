"""What a call gives back, and what it says on the way."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError
from .pictures.images import Float32, UInt8, check_output, save_png

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a call gives back.

    images: uint8 [B, H, W, 3]. seeds: one an image. latents: float32 [B, C, h, w], what was decoded. parameters: by
    image, what made it, as its PNG holds it. timings: milliseconds by stage (`text`, `encode_image`,
    `denoise`, `decode`, `total`; of the denoising: `evaluations`, a list, and `update`, `guidance`, `gather`).
    truncated: by image, whether the text encoder did not take all of its prompt or negative prompt.
    tensor: the images as torch uint8 [B, H, W, 3] on the device that made them, where it is one; DLPack gives these,
    or the NumPy images.
    """

    images: UInt8
    seeds: tuple[int, ...]
    timings: Mapping[str, Any]
    latents: Float32
    parameters: tuple[Mapping[str, Any], ...]
    truncated: tuple[bool, ...] = ()
    tensor: Any = field(default=None, repr=False)

    def __dlpack__(self, **options: Any) -> Any:
        return (self.images if self.tensor is None else self.tensor).__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return (self.images if self.tensor is None else self.tensor).__dlpack_device__()

    def to_pil(self) -> list[Image]:
        """The images as Pillow images."""
        from PIL import Image as pillow

        return [pillow.fromarray(i) for i in self.images]

    def save(self, path: str | os.PathLike[str]) -> list[str]:
        """Write PNGs with their parameters; of several images each gets its number before the suffix."""
        target = check_output(path)
        stem, suffix = str(target.with_suffix("")), target.suffix
        names = (
            [f"{stem}{suffix or '.png'}"]
            if len(self.images) == 1
            else [f"{stem}-{i}{suffix or '.png'}" for i in range(len(self.images))]
        )
        for name, image, parameters in zip(names, self.images, self.parameters, strict=True):
            save_png(name, image, parameters)
        return names


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Progress of a call: evaluation `index` of `total` was made at `timestep`.

    With previews switched on, `x0` is the image latent as this evaluation sees it, float32 [B, C, h, w], and
    `preview()` decodes it to uint8 [B, H, W, 3].
    """

    index: int
    total: int
    timestep: float
    x0: Float32 | None = None
    _latents: Callable[[], Float32] | None = field(default=None, repr=False)
    _decode: Callable[[Float32], UInt8] | None = field(default=None, repr=False)

    def latents(self) -> Float32:
        """The latents after this evaluation, in diffusers' coordinates, float32 [B, C, h, w]; until the next one."""
        if self._latents is None:
            raise ArgumentError("this call does not show its latents", remedy="Run it on the CPU.")
        return self._latents()

    def preview(self) -> UInt8:
        """`x0` decoded, uint8 [B, H, W, 3]; `ArgumentError` where the call makes no previews."""
        if self.x0 is None or self._decode is None:
            raise ArgumentError("this call makes no previews", remedy="Pass previews=True.")
        return self._decode(self.x0)
