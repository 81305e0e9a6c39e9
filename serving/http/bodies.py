"""Bodies under caps: counted while they stream in, pictures measured before they are decoded."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING, Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from ...runtime.pictures.images import FORMATS
from .errors import HttpError

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_FIELDS = 40


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


async def read_form(request: Request, limit: int) -> tuple[dict[str, Any], list[bytes]]:
    """The fields of a multipart form, and the files called `image` or `image[]`, of `limit` bytes together."""
    check_content_type(request, "multipart/form-data")
    parser = MultiPartParser(
        request.headers, _capped(request, limit), max_files=2, max_fields=MOST_FIELDS, max_part_size=64 * 1024
    )
    try:
        form = await parser.parse()
    except (MultiPartException, HTTPException, KeyError, ValueError, UnicodeDecodeError) as error:
        if isinstance(error, HttpError):
            raise
        raise HttpError(400, "invalid_request", "the form cannot be read") from error
    fields: dict[str, Any] = {}
    pictures = []
    try:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if name not in ("image", "image[]"):
                    raise HttpError(400, "invalid_request", "the form has a file that is not called image")
                pictures.append(await value.read())
            elif name in fields:
                raise HttpError(400, "invalid_request", "the form has a field twice")
            else:
                fields[name] = value
    finally:
        await form.close()
    return fields, pictures


def open_picture(data: bytes, most_pixels: int) -> Image:
    """An RGB picture from a PNG, JPEG or WebP file's bytes: first frame, no metadata. Errors are `HttpError` 422."""
    from PIL import Image as pillow

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pillow.DecompressionBombWarning)
            with pillow.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > most_pixels:
                    raise HttpError(
                        422, "invalid_image", f"the image has {image.width}x{image.height} pixels; at most "
                        f"{most_pixels} are taken"
                    )  # fmt: skip
                return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError, pillow.DecompressionBombWarning) as error:
        raise HttpError(422, "invalid_image", "the image is no whole PNG, JPEG or WebP file") from error


def encode_picture(pixels: Any, kind: str, quality: int | None) -> bytes:
    """uint8 [H, W, 3] as the bytes of a PNG, JPEG or WebP file."""
    from PIL import Image as pillow

    out = io.BytesIO()
    options: dict[str, Any] = (
        {"compress_level": 1} if kind == "png" else {"quality": 90 if quality is None else quality}
    )
    pillow.fromarray(pixels).save(out, kind.upper(), **options)
    return out.getvalue()


__all__ = ["ClientDisconnect", "check_content_type", "encode_picture", "open_picture", "read_body", "read_form"]
