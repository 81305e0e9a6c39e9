"""What a request asks of its clips beside their pictures."""

from __future__ import annotations

from dataclasses import dataclass

from .arrays import Float32


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ClipTerms:
    """The same for all clips of a request.

    fps: frames per second. guidance: by frame; listed: whether they were given so. chunk: frames that are decoded
    together. pixels: by picture float32 [3, S, S], as the image encoder takes it.
    """

    frames: int
    fps: int
    motion_bucket: int
    noise_augmentation: float
    guidance: tuple[float, ...]
    listed: bool
    chunk: int
    pixels: tuple[Float32, ...]
