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

from ...errors import ArgumentError, CorruptError, MissingError
from ..arrays import Float32, UInt8

if TYPE_CHECKING:
    from PIL.Image import Image

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
    if not isinstance(source, (str, os.PathLike)):
        raise ArgumentError(
            f"the image is {type(source).__name__}", expected="a path, a Pillow image or uint8 [H, W, 3]"
        )
    path = _existing_file(source)
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


def _existing_file(source: str | os.PathLike[str]) -> Path:
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


def read_parameters(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The parameters in a PNG that fewstep wrote; `CorruptError` when there are none."""
    from PIL import Image as pillow

    file = _existing_file(path)
    try:
        with pillow.open(file, formats=("PNG",)) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ArgumentError(
                    f"{file.name} is {image.width}x{image.height}", expected=f"at most {MOST_PIXELS} pixels"
                )
            image.load()
            text = getattr(image, "text", {}).get(JSON_KEY)
        parameters = json.loads(text) if text else None
    except (OSError, SyntaxError, ValueError, RecursionError, pillow.DecompressionBombError) as error:
        raise CorruptError(f"{file.name} cannot be read as a PNG of fewstep") from error
    types = {"bundle": str, "prompt": str, "width": int, "height": int}
    if not isinstance(parameters, dict) or not all(isinstance(parameters.get(k), t) for k, t in types.items()):
        raise CorruptError(f"{file.name} holds no parameters of fewstep", expected=f"a text chunk {JSON_KEY!r}")
    return parameters


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
    """The command that makes the picture again; of a batch with one stream of noise, the whole batch."""
    batch = p.get("batch") if isinstance(p.get("batch"), dict) else None
    words = ["fewstep", "run", str(p["bundle"])]
    words += [f"--prompt={prompt}" for prompt in (batch["prompts"] if batch else [p["prompt"]])]
    if p.get("negative") is not None:
        words.append(f"--negative={p['negative']}")
    for key in ("prompt_2", "negative_2"):
        if p.get(key) is not None:
            words.append(f"--{key.replace('_', '-')}={p[key]}")
    for key in ("steps", "sampler", "schedule", "guidance", "compat"):
        if p.get(key) is not None:
            words.append(f"--{key}={p[key]}")
    words.append(f"--seed={batch['seed'] if batch else p.get('seed')}")
    if batch:
        words.append("--shared-stream")
    for key, value in {**(p.get("options") or {}), **(p.get("recorded") or {})}.items():
        joint = "x" if key.endswith("_size") else ","
        shown = joint.join(f"{v:g}" for v in value) if isinstance(value, (list, tuple)) else value
        words.append(f"--{key.replace('_', '-')}={shown}")
    words.append(f"--size={p['width']}x{p['height']}")
    if p.get("image"):
        words += [f"--image={p['image']}", f"--strength={p['strength']}"]
    return shlex.join([*words, f"--output={output}"])
