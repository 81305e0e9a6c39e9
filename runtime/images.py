"""Images in and out: decoding with caps, a stated resize policy, PNGs that say how they were made."""

from __future__ import annotations

import json
import os
import shlex
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, CorruptError, MissingError

if TYPE_CHECKING:
    from PIL.Image import Image

UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]
MOST_PIXELS = 64 * 1024 * 1024
MOST_BYTES = 64 * 1024 * 1024
FORMATS = ("PNG", "JPEG", "WEBP")
TEXT_KEY = "parameters"
JSON_KEY = "fewstep"


def open_image(source: str | os.PathLike[str] | Image | UInt8) -> Image:
    """An RGB picture from a file (PNG, JPEG or WebP), a Pillow image, or a uint8 array [H, W, 3].

    Size in bytes and in pixels is checked before anything is decoded; of several frames the first is taken.
    """
    from PIL import Image as pillow

    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or 0 in source.shape:
            raise ArgumentError(f"the image is an array {source.dtype} {source.shape}", expected="uint8 [H, W, 3]")
        return pillow.fromarray(source)
    if isinstance(source, pillow.Image):
        return source.convert("RGB")
    path = Path(source)
    if not path.is_file():
        raise MissingError(f"no image {str(source)!r}", expected="a PNG, JPEG or WebP file")
    if path.stat().st_size > MOST_BYTES:
        raise ArgumentError(f"{path.name} has {path.stat().st_size} bytes", expected=f"at most {MOST_BYTES}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pillow.DecompressionBombWarning)
            with pillow.open(path, formats=FORMATS) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise ArgumentError(
                        f"{path.name} is {image.width}x{image.height}", expected=f"at most {MOST_PIXELS} pixels"
                    )
                return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError, pillow.DecompressionBombWarning) as error:
        raise CorruptError(
            f"{path.name} cannot be read as an image", expected="a whole PNG, JPEG or WebP file"
        ) from error


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
    target = Path(path)
    if not target.parent.is_dir():
        raise MissingError(f"no folder {str(target.parent)!r} to write the picture into", remedy="Make it first.")
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        pillow.fromarray(image).save(part, format="PNG", pnginfo=info, compress_level=1)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def read_parameters(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The parameters in a PNG that fewstep wrote; `CorruptError` when there are none."""
    from PIL import Image as pillow

    if not Path(path).is_file():
        raise MissingError(f"no file {str(path)!r}", expected="a PNG that fewstep made")
    try:
        with pillow.open(path, formats=("PNG",)) as image:
            image.load()
            text = getattr(image, "text", {}).get(JSON_KEY)
        found = json.loads(text) if text else None
    except (OSError, SyntaxError, ValueError) as error:
        raise CorruptError(f"{Path(path).name} cannot be read as a PNG") from error
    if not isinstance(found, dict):
        raise CorruptError(f"{Path(path).name} holds no parameters of fewstep", expected=f"a text chunk {JSON_KEY!r}")
    return found


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


def command_line(p: Mapping[str, Any], output: str) -> str:
    """The command that makes the picture again."""
    words = ["fewstep", "run", str(p["bundle"]), "--prompt", str(p["prompt"])]
    if p.get("negative") is not None:
        words += ["--negative", str(p["negative"])]
    for key in ("steps", "sampler", "schedule", "guidance", "seed", "compat"):
        if p.get(key) is not None:
            words += [f"--{key}", str(p[key])]
    words += ["--size", f"{p['width']}x{p['height']}"]
    if p.get("image"):
        words += ["--image", str(p["image"]), "--strength", str(p["strength"])]
    return shlex.join([*words, "--output", output])
