"""Input pictures of a live session, from whatever they come as to pixels of the right size."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np

from ...errors import ArgumentError, CorruptError
from ...runtime.arrays import UInt8
from ...runtime.pictures.images import FORMATS, open_image, to_unit
from ...runtime.pictures.resize import Pictures, fit_picture

MOST_BYTES = 1024 * 1024
MOST_PIXELS = 2048 * 2048


def read_picture(source: Any, size: tuple[int, int]) -> UInt8:
    """A picture as uint8 [H, W, 3] of `size` (width, height); of another shape, what fills it of its middle.

    source: the bytes of a PNG, JPEG or WebP file (at most `MOST_BYTES` and, before it is decoded, `MOST_PIXELS`), or
    what `open_image` takes. Raises `ArgumentError` for too much and `CorruptError` for what is no such file.
    """
    image = _decode(source) if isinstance(source, bytes) else open_image(source)
    return np.asarray(fit_picture(image, *size, "cover"))


def as_pictures(image: UInt8, size: tuple[int, int]) -> Pictures:
    """What a request of `size` starts from, of uint8 [H, W, 3]."""
    from PIL import Image as pillow

    return Pictures(pixels=to_unit(fit_picture(pillow.fromarray(image), *size, "cover"), *size)[None], masks=None)


def _decode(data: bytes) -> Any:
    from PIL import Image as pillow

    if len(data) > MOST_BYTES:
        raise ArgumentError(f"the picture has {len(data)} bytes", expected=f"at most {MOST_BYTES}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pillow.DecompressionBombWarning)
            with pillow.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise ArgumentError(
                        f"the picture is {image.width}x{image.height}", expected=f"at most {MOST_PIXELS} pixels"
                    )
                return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError, pillow.DecompressionBombWarning) as error:
        raise CorruptError("the picture cannot be read", expected="a whole PNG, JPEG or WebP file") from error
