"""Input pictures of a live session, from whatever they come as to pixels of the right size."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...runtime.arrays import UInt8
from ...runtime.pictures.images import to_unit
from ...runtime.pictures.reading import open_image
from ...runtime.pictures.resize import Pictures, fit_picture

MOST_BYTES = 1024 * 1024
MOST_PIXELS = 2048 * 2048


def read_picture(source: Any, size: tuple[int, int]) -> UInt8:
    """A picture as uint8 [H, W, 3] of `size` (width, height); of another shape, what fills it of its middle.

    source: the bytes of a PNG, JPEG or WebP file (at most `MOST_BYTES` and, before it is decoded, `MOST_PIXELS`), or
    what `open_image` takes. Raises `ArgumentError` for too much and `CorruptError` for what is no such file.
    """
    caps = {"most_bytes": MOST_BYTES, "most_pixels": MOST_PIXELS} if isinstance(source, bytes) else {}
    return np.asarray(fit_picture(open_image(source, **caps), *size, "cover"))


def as_pictures(image: UInt8, size: tuple[int, int]) -> Pictures:
    """What a request of `size` starts from, of uint8 [H, W, 3]."""
    from PIL import Image as pillow

    return Pictures(pixels=to_unit(fit_picture(pillow.fromarray(image), *size, "cover"), *size)[None], masks=None)
