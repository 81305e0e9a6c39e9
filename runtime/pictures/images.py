"""Pictures out, and as networks take them: files that say how they were made, and pixels from -1 to 1."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import ArgumentError, MissingError
from ...places import write_whole
from ..arrays import Float32, UInt8
from .infotext import infotext
from .texts import JSON_KEY, PROMPT_KEY, TEXT_KEY, exif_of, png_texts
from .workflow import comfy_prompt

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".avif": "AVIF"}
QUALITY: dict[str, dict[str, Any]] = {
    "PNG": {"compress_level": 1},
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"quality": 95},
    "AVIF": {"quality": 90},
}


def check_output(path: str | os.PathLike[str]) -> Path:
    """Where a picture is to go, if one can be written there; asked before it is made."""
    target = Path(path)
    text = os.fspath(path)
    if not text or text.endswith(("/", os.sep)) or target.is_dir():
        raise ArgumentError(f"the output is {text!r}", expected="the name of a picture's file")
    if text == "-":
        raise ArgumentError("the output is '-'", expected="a file's name: no picture goes to standard output")
    if target.suffix.lower() not in {"", *FORMATS}:
        raise ArgumentError(f"the output is {target.name!r}", expected=f"a name that ends in {', '.join(FORMATS)}")
    if not target.parent.is_dir():
        raise MissingError(f"no folder {str(target.parent)!r} to write the picture into", remedy="Make it first.")
    if target.suffix.lower() == ".avif":
        _check_avif()
    return target if target.suffix else target.with_suffix(".png")


def _check_avif() -> None:
    from PIL import features

    if not features.check("avif"):
        raise ArgumentError("this Pillow writes no AVIF", expected="a name that ends in .png, .jpg or .webp")


def to_unit(image: Image, width: int, height: int) -> Float32:
    """The picture resized to width x height with Lanczos (as diffusers does), float32 [3, H, W] in [-1, 1]."""
    from PIL import Image as pillow

    if image.size != (width, height):
        image = image.resize((width, height), pillow.Resampling.LANCZOS)
    pixels = np.asarray(image, np.float32) / np.float32(255.0)
    return np.ascontiguousarray((np.float32(2.0) * pixels - np.float32(1.0)).transpose(2, 0, 1))


def pillow_images(images: UInt8) -> list[Image]:
    """uint8 [N, H, W, 3] as Pillow images."""
    from PIL import Image as pillow

    return [pillow.fromarray(i) for i in images]


def png_bytes(image: UInt8) -> bytes:
    """uint8 [H, W, 3] as a PNG without parameters."""
    from PIL import Image as pillow

    written = io.BytesIO()
    pillow.fromarray(image).save(written, format="PNG", compress_level=1)
    return written.getvalue()


def save_picture(path: str | os.PathLike[str], image: UInt8, parameters: Mapping[str, Any] | None = None) -> None:
    """Write uint8 [H, W, 3] in the format of the suffix, whole or not at all, with the parameters that made it.

    They stand in it three times: as fewstep's own JSON, as the web UI of A1111 writes them, and in PNGs, of calls that
    its nodes do, as a prompt for ComfyUI. Raises `ArgumentError` for another suffix, `MissingError` where there is no
    folder, and `WriteError` where it cannot be written.
    """
    from PIL import Image as pillow

    target = check_output(path)
    kind = FORMATS[target.suffix.lower()]
    texts = {} if parameters is None else picture_texts(parameters)
    beside: dict[str, Any] = {"pnginfo": png_texts(texts)} if kind == "PNG" else {"exif": exif_of(texts)}
    written = io.BytesIO()  # as Pillow itself writes a JPEG to a full disk cut off, and says nothing
    pillow.fromarray(image).save(written, format=kind, **QUALITY[kind], **(beside if texts else {}))
    write_whole(target.absolute(), written.getvalue())


def picture_texts(parameters: Mapping[str, Any]) -> dict[str, str]:
    """What a picture says of its parameters, by the text's key."""
    workflow = comfy_prompt(parameters)
    return {
        TEXT_KEY: infotext(parameters),
        JSON_KEY: json.dumps(dict(parameters), ensure_ascii=False),
        **({} if workflow is None else {PROMPT_KEY: json.dumps(workflow)}),
    }
