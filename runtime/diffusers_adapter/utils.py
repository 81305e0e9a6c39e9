"""The two helpers of `diffusers.utils` that go with pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...errors import ArgumentError, MissingError, UnsupportedError

if TYPE_CHECKING:
    from PIL.Image import Image


def load_image(image: str | os.PathLike[str] | Image) -> Image:
    """A picture from a file, or a Pillow image, upright and in RGB, as diffusers loads it. Addresses are refused."""
    from PIL import Image as pillow
    from PIL import ImageOps

    if isinstance(image, (str, os.PathLike)):
        if str(image).startswith(("http://", "https://")):
            raise UnsupportedError("load_image of an address", remedy="Fetch it first, and give the file.")
        try:
            image = pillow.open(image)
        except OSError as error:
            raise MissingError(f"no picture can be read from {str(image)!r} ({error})") from error
    return ImageOps.exif_transpose(image).convert("RGB")


def make_image_grid(images: Sequence[Image], rows: int, cols: int, resize: int | None = None) -> Image:
    """Pillow images of one size in rows and columns; `resize` makes each a square of that side first."""
    from PIL import Image as pillow

    if len(images) != rows * cols:
        raise ArgumentError(f"{len(images)} images for {rows} x {cols}", expected=f"{rows * cols}")
    tiles = [i if resize is None else i.resize((resize, resize)) for i in images]
    width, height = tiles[0].size
    grid = pillow.new("RGB", (cols * width, rows * height))
    for i, tile in enumerate(tiles):
        grid.paste(tile, (i % cols * width, i // cols * height))
    return grid
