"""Pictures out, and as networks take them: PNGs that say how they were made, and pixels from -1 to 1."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import ArgumentError, MissingError
from ..arrays import Float32, UInt8
from .parameters import JSON_KEY

if TYPE_CHECKING:
    from PIL.Image import Image

TEXT_KEY = "parameters"


def check_output(path: str | os.PathLike[str]) -> Path:
    """Where a PNG is to go, if one can be written there; asked before the picture is made."""
    target = Path(path)
    text = os.fspath(path)
    if not text or text.endswith(("/", os.sep)) or target.is_dir():
        raise ArgumentError(f"the output is {text!r}", expected="the name of a PNG file")
    if target.suffix.lower() not in {"", ".png"}:
        raise ArgumentError(f"the output is {target.name!r}", expected="a name that ends in .png")
    if not target.parent.is_dir():
        raise MissingError(f"no folder {str(target.parent)!r} to write the picture into", remedy="Make it first.")
    return target if target.suffix else target.with_suffix(".png")


def to_unit(image: Image, width: int, height: int) -> Float32:
    """The picture resized to width x height with Lanczos (as diffusers does), float32 [3, H, W] in [-1, 1]."""
    from PIL import Image as pillow

    if image.size != (width, height):
        image = image.resize((width, height), pillow.Resampling.LANCZOS)
    pixels = np.asarray(image, np.float32) / np.float32(255.0)
    return np.ascontiguousarray((np.float32(2.0) * pixels - np.float32(1.0)).transpose(2, 0, 1))


def save_png(path: str | os.PathLike[str], image: UInt8, parameters: Mapping[str, Any] | None = None) -> None:
    """Write a PNG, whole or not at all, with the parameters that made it in two text chunks."""
    from PIL import Image as pillow
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if parameters is not None:
        info.add_itxt(TEXT_KEY, a1111_text(parameters))
        info.add_itxt(JSON_KEY, json.dumps(dict(parameters), ensure_ascii=False))
    target = check_output(path)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        pillow.fromarray(image).save(part, format="PNG", pnginfo=info, compress_level=1)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def a1111_text(p: Mapping[str, Any]) -> str:
    """The parameters as the web UI of A1111 writes them."""
    lines = [str(p.get("prompt", ""))]
    if p.get("negative"):
        lines.append(f"Negative prompt: {p['negative']}")
    parts = [("Steps", p.get("steps")), ("Sampler", p.get("sampler_name")), ("Schedule type", p.get("schedule_name"))]
    parts += [
        ("CFG scale", p.get("guidance")),
        ("Seed", p.get("seed")),
        ("Size", f"{p.get('width')}x{p.get('height')}"),
    ]
    parts += [
        ("Model", p.get("model")),
        ("Denoising strength", p.get("strength") if p.get("image") else None),
        ("Version", f"fewstep {p.get('version')}"),
    ]
    lines.append(", ".join(f"{k}: {v}" for k, v in parts if v is not None))
    return "\n".join(lines)
