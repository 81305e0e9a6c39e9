"""Pictures in: one reading for every door, be it a file, its bytes, a Pillow image or an array.

Decoding stands under caps of bytes and pixels. A picture is turned as its EXIF (or XMP) orientation says. Alpha is
dropped and the colours that lie under it are taken as they are stored, whatever it says: nothing is laid over a
background. That is what diffusers' `load_image` does. Grey of 16 bits is rounded to 8. Colour profiles are not applied,
and of several frames the first is taken.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from ...errors import ArgumentError, CorruptError, MissingError
from ..arrays import UInt8

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PIXELS = 64 * 1024 * 1024
MOST_BYTES = 64 * 1024 * 1024
FORMATS = ("PNG", "JPEG", "WEBP")
ORIENTATION = 0x0112
TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
"""EXIF's orientations, by Pillow's `Transpose` that undoes each."""
Source: TypeAlias = "str | os.PathLike[str] | bytes | Image | UInt8"
_UNREADABLE = (OSError, SyntaxError, ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error)


def open_image(source: Source, *, most_bytes: int = MOST_BYTES, most_pixels: int = MOST_PIXELS) -> Image:
    """An upright RGB picture from a file (PNG, JPEG or WebP) or its bytes, a Pillow image, or uint8 [H, W, 3].

    Raises `ArgumentError` for what is too much or no picture, `MissingError` where there is no file, and `CorruptError`
    for one that cannot be read.
    """
    return _to_rgb(_open(source, most_bytes, most_pixels))


def open_as_is(source: Source, *, most_bytes: int = MOST_BYTES, most_pixels: int = MOST_PIXELS) -> Image:
    """As `open_image`, but a Pillow image of mode `1` or `L` keeps it: diffusers resizes masks in their own mode."""
    image = _open(source, most_bytes, most_pixels)
    return image if image.mode in {"1", "L"} and not isinstance(source, (str, os.PathLike, bytes)) else _to_rgb(image)


def open_alpha(source: Source, *, most_bytes: int = MOST_BYTES, most_pixels: int = MOST_PIXELS) -> Image | None:
    """What a picture says of opacity, upright and in grey: 0 is clear, 255 opaque. `None` where it says nothing."""
    from PIL import Image as pillow

    image = _open(source, most_bytes, most_pixels)
    if not image.has_transparency_data:
        return None
    if image.mode.startswith("I;16"):
        clear = np.asarray(image) == image.info["transparency"]
        return pillow.fromarray(np.where(clear, np.uint8(0), np.uint8(255)))
    return image.convert("RGBA").getchannel("A")


def as_stored(image: Image) -> Image:
    """A Pillow image without what it says of its orientation: diffusers' pipelines take its pixels as they lie."""
    plain = image.copy()
    plain.info = {}
    return plain


def _to_rgb(image: Image) -> Image:
    """A Pillow image of any mode in RGB; `ArgumentError` for values that no mode of 8 bits holds."""
    from PIL import Image as pillow

    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.uint32)
        return pillow.fromarray(((wide + 128) // 257).astype(np.uint8)).convert("RGB")
    low, high = image.getextrema() if image.mode in {"I", "F"} else (0, 0)
    if image.mode == "F" or low < 0 or high > 255:
        raise ArgumentError(
            f"the picture has mode {image.mode!r} and values from {low} to {high}",
            expected="8 bits a channel, or grey of 16 bits in mode 'I;16'",
            remedy="Convert it to mode 'RGB', 'L' or 'I;16' first.",
        )
    return image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)).convert("RGB")


def _open(source: Source, most_bytes: int, most_pixels: int) -> Image:
    """The picture in its own mode, decoded and upright."""
    from PIL import Image as pillow

    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or 0 in source.shape:
            raise ArgumentError(f"the image is an array {source.dtype} {source.shape}", expected="uint8 [H, W, 3]")
        return pillow.fromarray(source)
    if isinstance(source, pillow.Image):
        try:
            return _upright(source)
        except (OSError, SyntaxError, ValueError) as error:
            raise CorruptError(f"the picture cannot be decoded ({error})", expected="a whole picture") from error
    if isinstance(source, bytes):
        name, count = "the picture", len(source)
    elif isinstance(source, (str, os.PathLike)):
        path = existing_file(source)
        name, count = path.name, path.stat().st_size
    else:
        raise ArgumentError(
            f"the image is {type(source).__name__}", expected="a path, a Pillow image or uint8 [H, W, 3]"
        )
    if count > most_bytes:
        raise ArgumentError(f"{name} has {count} bytes", expected=f"at most {most_bytes}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pillow.DecompressionBombWarning)
            with pillow.open(io.BytesIO(source) if isinstance(source, bytes) else path, formats=FORMATS) as image:
                if image.width * image.height > most_pixels:
                    raise ArgumentError(
                        f"{name} is {image.width}x{image.height}", expected=f"at most {most_pixels} pixels"
                    )
                return _upright(image)
    except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError, pillow.DecompressionBombWarning) as error:
        raise CorruptError(f"{name} cannot be read as an image", expected="a whole PNG, JPEG or WebP file") from error


def _upright(image: Image) -> Image:
    """The picture turned as its orientation says, in memory of its own, and silent about it from then on."""
    from PIL.Image import Transpose

    image.load()  # a PNG may say it behind its pixels
    turn = TURNS.get(_orientation(image))
    turned = image.copy() if turn is None else image.transpose(Transpose(turn))
    turned.info = {k: v for k, v in image.info.items() if k == "transparency"}
    return turned


def _orientation(image: Image) -> int:
    """What EXIF, or without it XMP, says of a picture's orientation; 1 where neither can be read."""
    try:
        stated = image.getexif().get(ORIENTATION, 1)
    except _UNREADABLE:
        return 1
    return stated if isinstance(stated, int) else 1


def existing_file(source: str | os.PathLike[str]) -> Path:
    """The path, if there is a file of at most `MOST_BYTES`."""
    path = Path(source)
    try:
        exists = path.is_file()
    except (OSError, ValueError):
        exists = False
    if not exists:
        raise MissingError(f"no file {str(source)[:200]!r}", expected="a picture")
    if path.stat().st_size > MOST_BYTES:
        raise ArgumentError(f"{path.name} has {path.stat().st_size} bytes", expected=f"at most {MOST_BYTES}")
    return path
