"""Pictures as the image encoder of clips takes them: blurred by as much as they shrink, then bicubic to its size.

diffusers' `_resize_with_antialiasing`, whose numbers are kornia's; in float32 as torch computes them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...errors import ArgumentError
from ...families.image_prompt import CLIP_DEVIATION, CLIP_MEAN
from ..arrays import Float32

if TYPE_CHECKING:
    from PIL.Image import Image

LEAST_SIDE = 2
"""Pixels that the blur takes to reflect."""
CUBIC = -0.75
"""The free coefficient of bicubic interpolation, as torch has it."""


def antialiased_pixels(picture: Image, side: int) -> Float32:
    """float32 [3, S, S] of an RGB picture: resized from values between -1 and 1, then normalised as CLIP takes it."""
    if min(picture.size) < LEAST_SIDE:
        raise ArgumentError(
            f"the picture is {picture.width}x{picture.height}", expected=f"at least {LEAST_SIDE}x{LEAST_SIDE}"
        )
    values = np.asarray(picture, np.float32).transpose(2, 0, 1) / np.float32(255.0)
    values = values * np.float32(2.0) - np.float32(1.0)
    for axis in (-1, -2):
        values = _blurred(values, axis, values.shape[axis] / side)
    for axis in (-1, -2):
        values = _resized(values, axis, side)
    values = (values + np.float32(1.0)) / np.float32(2.0)
    mean, deviation = (np.array(v, np.float32)[:, None, None] for v in (CLIP_MEAN, CLIP_DEVIATION))
    return np.ascontiguousarray((values - mean) / deviation)


def _blurred(values: Float32, axis: int, factor: float) -> Float32:
    """A Gaussian of sigma (factor - 1) / 2 along an axis, over an odd number of pixels, two sigmas to each side."""
    sigma = np.float32(max((factor - 1.0) / 2.0, 0.001))
    width = int(max(4.0 * max((factor - 1.0) / 2.0, 0.001), 3)) | 1
    at = np.arange(width, dtype=np.float32) - width // 2
    weights = np.exp(-(at**2) / (2 * sigma**2))
    weights /= weights.sum()
    around = [(0, 0)] * values.ndim
    around[axis] = (width // 2, width // 2)
    padded = np.moveaxis(np.pad(values, around, mode="reflect"), axis, -1)
    blurred = np.zeros_like(padded[..., : values.shape[axis]])
    for i, weight in enumerate(weights):
        blurred += weight * padded[..., i : i + values.shape[axis]]
    return np.moveaxis(blurred, -1, axis)


def _resized(values: Float32, axis: int, side: int) -> Float32:
    """Bicubic interpolation along an axis, first and last pixels on each other (`align_corners`)."""
    length = values.shape[axis]
    places = np.float32((length - 1) / (side - 1)) * np.arange(side, dtype=np.float32)
    first = np.minimum(np.floor(places), length - 1)
    t = (places - first)[:, None]
    distances = np.abs(np.concatenate([t + 1, t, 1 - t, 2 - t], axis=1))  # of the four pixels around
    near = ((CUBIC + 2) * distances - (CUBIC + 3)) * distances**2 + 1
    far = ((CUBIC * distances - 5 * CUBIC) * distances + 8 * CUBIC) * distances - 4 * CUBIC
    weights = np.where(distances <= 1, near, far).astype(np.float32)
    moved = np.moveaxis(values, axis, -1)
    out = np.zeros((*moved.shape[:-1], side), np.float32)
    for k in range(4):
        index = np.clip(first.astype(np.int64) + k - 1, 0, length - 1)
        out += weights[:, k] * moved[..., index]
    return np.moveaxis(out, -1, axis)
