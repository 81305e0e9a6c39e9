"""What a second pass begins with: a picture or its latent, made larger."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ...errors import UnknownNameError
from ..arrays import Float32, UInt8

UPSCALERS = ("lanczos", "nearest", "latent", "latent-nearest")
"""Of pictures, and of latents: linear as the web UI of A1111 does it, or of the nearest cell."""
_LABELS = {"none": "lanczos", "latent_(nearest)": "latent-nearest", "latent_(nearest_exact)": "latent-nearest"}


def find_upscaler(name: str) -> str | None:
    """Ours of a name, A1111's names included; `None` for another."""
    folded = name.strip().lower().replace(" ", "_")
    known = _LABELS.get(folded, folded)
    return known if known in UPSCALERS else None


def check_upscaler(name: object) -> str:
    """The upscaler's name; `UnknownNameError` for another."""
    if not isinstance(name, str) or name not in UPSCALERS:
        raise UnknownNameError("upscaler", str(name), UPSCALERS)
    return name


def enlarge_pictures(images: UInt8, size: tuple[int, int], upscaler: str) -> list[UInt8]:
    """Pictures uint8 [B, H, W, 3] at size (width, height): by Lanczos, or of the nearest pixel."""
    from PIL import Image as pillow

    how = pillow.Resampling.NEAREST if upscaler == "nearest" else pillow.Resampling.LANCZOS
    return [np.asarray(pillow.fromarray(image).resize(size, how)) for image in images]


def enlarge_latents(latents: Float32, size: tuple[int, int], upscaler: str) -> Float32:
    """Latents float32 [B, C, h, w] at size (w, h) in cells, as torch's `interpolate` with `bilinear` or `nearest`."""
    wide, high = size
    nearest = upscaler == "latent-nearest"
    return _along(_along(latents, high, -2, nearest=nearest), wide, -1, nearest=nearest)


def _along(latents: Float32, count: int, axis: int, *, nearest: bool) -> Float32:
    have = latents.shape[axis]
    if nearest:
        cells: Float32 = latents.take((np.arange(count) * have) // count, axis)
        return cells
    at = np.maximum((np.arange(count) + 0.5) * (have / count) - 0.5, 0.0)
    low = np.minimum(at.astype(np.int64), have - 1)
    share = _shaped((at - low).astype(np.float32), axis, latents.ndim)
    upper = latents.take(np.minimum(low + 1, have - 1), axis)
    mixed: Float32 = latents.take(low, axis) * (np.float32(1.0) - share) + upper * share
    return mixed


def _shaped(values: npt.NDArray[np.float32], axis: int, ndim: int) -> Float32:
    shape: Sequence[int] = [len(values) if i == axis % ndim else 1 for i in range(ndim)]
    return values.reshape(shape)
