"""Bodies under caps: counted while they stream in, pictures measured before they are decoded."""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from ...errors import ArgumentError, CorruptError, QueueFullError
from ...runtime.pictures.reading import open_alpha, open_image
from .errors import HttpError, shown

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_FIELDS = 64
MOST_FILES = 8
IP_FILE = "ip_adapter"
_CONTROL_FILE = re.compile(r"control\[([A-Za-z0-9_]{1,64})\]")


class BodyBudget:
    """Bytes of bodies that are read, or wait to be decoded, at once. For one event loop."""

    def __init__(self, most: int) -> None:
        self._most = self._left = most

    @contextmanager
    def hold(self, request: Request, limit: int) -> Iterator[None]:
        """Count a body's bytes within: those it declares, or `limit`; `QueueFullError` if that is too much."""
        declared = request.headers.get("content-length", "")
        needed = min(int(declared), limit) if declared.isdigit() else limit
        if needed > self._left:
            raise QueueFullError(
                f"{self._most - self._left} bytes of bodies are being read",
                expected=f"at most {self._most} at once",
                retry_after_s=1.0,
                remedy="Try again later.",
            )
        self._left -= needed
        try:
            yield
        finally:
            self._left += needed


async def read_body(request: Request, limit: int) -> bytes:
    """The body, of at most `limit` bytes; what is over is not read."""
    parts = bytearray()
    async for part in _capped(request, limit):
        parts += part
    return bytes(parts)


async def _capped(request: Request, limit: int) -> Any:
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise HttpError(413, "too_large", f"the body has {int(declared)} bytes; at most {limit} are taken")
    count = 0
    async for part in request.stream():
        count += len(part)
        if count > limit:
            raise HttpError(413, "too_large", f"the body has over {limit} bytes")
        yield part


def check_content_type(request: Request, expected: str) -> None:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != expected:
        raise HttpError(415, "unsupported_media_type", f"the content type must be {expected}")


async def read_form(
    request: Request, limit: int, *, lists: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, list[bytes]]]:
    """The fields of a multipart form, and its files, of `limit` bytes together.

    Each field is there once, but `lists`, which come as a list where they are there more often.
    Files are `image` (or `image[]`) and `mask`, which are there even if empty, `control[NAME]` and `ip_adapter`.
    """
    check_content_type(request, "multipart/form-data")
    parser = MultiPartParser(
        request.headers, _capped(request, limit), max_files=MOST_FILES, max_fields=MOST_FIELDS, max_part_size=64 * 1024
    )
    try:
        form = await parser.parse()
    except (MultiPartException, HTTPException, KeyError, ValueError, UnicodeDecodeError) as error:
        if isinstance(error, HttpError):
            raise
        raise HttpError(400, "invalid_request", "the form cannot be read") from error
    fields: dict[str, Any] = {}
    files: dict[str, list[bytes]] = {"image": [], "mask": []}
    try:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                kind = name.removesuffix("[]")
                if kind not in ("image", "mask") and (kind in files or (kind != IP_FILE and not control_file(kind))):
                    raise HttpError(
                        400,
                        "invalid_request",
                        f"the form has a file {shown(name)}; image, mask, control[NAME] and ip_adapter are taken, once",
                    )
                files.setdefault(kind, []).append(await value.read())
            elif name in fields and name in lists:
                fields[name] = [*(fields[name] if isinstance(fields[name], list) else [fields[name]]), value]
            elif name in fields:
                raise HttpError(400, "invalid_request", f"the form has the field {shown(name)} twice")
            else:
                fields[name] = value
    finally:
        await form.close()
    return fields, files


def control_file(name: str) -> str | None:
    """The control that a form's file is for."""
    match = _CONTROL_FILE.fullmatch(name)
    return match and match[1]


def open_picture(data: bytes, most_pixels: int, *, name: str = "image") -> Image:
    """An upright RGB picture from a PNG, JPEG or WebP file's bytes. Errors are `HttpError` 422."""
    with _refused(name):
        return open_image(data, most_pixels=most_pixels)


def open_clear_mask(data: bytes, most_pixels: int, size: tuple[int, int]) -> Image:
    """A mask as OpenAI defines it, in grey: white where the file is fully transparent, black elsewhere.

    It has the picture's `size` (width, height) in pixels. Errors are `HttpError` 422.
    """
    with _refused("mask"):
        alpha = open_alpha(data, most_pixels=most_pixels)
    if alpha is None:
        raise HttpError(
            422,
            "invalid_image",
            "the mask has no transparency; what is fully clear is made anew, or what is white where mask_kind is white",
            param="mask",
        )
    return _of_size(alpha, size).point([255] + [0] * 255)


def open_white_mask(data: bytes, most_pixels: int, size: tuple[int, int]) -> Image:
    """A mask as most programs paint it, in grey: white where the picture is made anew. As `open_clear_mask`."""
    return _of_size(open_picture(data, most_pixels, name="mask").convert("L"), size)


def _of_size(mask: Image, size: tuple[int, int]) -> Image:
    if mask.size != size:
        shown = f"{mask.width}x{mask.height}", f"{size[0]}x{size[1]}"
        raise HttpError(422, "invalid_image", f"the mask is {shown[0]} and the image {shown[1]}", param="mask")
    return mask


@contextmanager
def _refused(name: str) -> Iterator[None]:
    """The runtime's refusals of a picture as answers that name the form's file."""
    try:
        yield
    except (ArgumentError, CorruptError) as error:
        raise HttpError(422, "invalid_image", f"{name}: {error}", param=name[:64]) from error


def encode_picture(pixels: Any, kind: str, quality: int | None) -> bytes:
    """uint8 [H, W, 3] as the bytes of a PNG, JPEG or WebP file."""
    from PIL import Image as pillow

    out = io.BytesIO()
    options: dict[str, Any] = (
        {"compress_level": 1} if kind == "png" else {"quality": 90 if quality is None else quality}
    )
    pillow.fromarray(pixels).save(out, kind.upper(), **options)
    return out.getvalue()


__all__ = [
    "BodyBudget",
    "ClientDisconnect",
    "check_content_type",
    "encode_picture",
    "open_clear_mask",
    "open_picture",
    "open_white_mask",
    "read_body",
    "read_form",
]
