"""Control pictures and pictures as prompts over HTTP: what a request says of them, and their bytes.

In a body of JSON a picture is base64, with or without the head of a `data:` address. In a form it is a file,
`control[NAME]` or `ip_adapter`, and the field says the rest.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from ...runtime.pictures.control import LEAST_SCALE, MOST_SCALE
from ...runtime.pictures.edges import MOST
from .bodies import IP_FILE, control_file, open_picture
from .errors import HttpError, shown

SCALE = Annotated[float, Meta(ge=LEAST_SCALE, le=MOST_SCALE, description="how much is taken; default: 1")] | None
SHARE = Annotated[float, Meta(ge=0, le=1, description="share of the evaluations")] | None
THRESHOLD = Annotated[float, Meta(ge=0, le=MOST)]
CANNY = Annotated[tuple[THRESHOLD, THRESHOLD], Meta(description="of a photograph: take edges, like [100, 200]")] | None
PICTURE = Annotated[str, Meta(description="a PNG, JPEG or WebP file in base64; in a form it is a file instead")] | None


class ControlField(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A control's picture, and how much of it is taken, between which shares of the evaluations."""

    image: PICTURE = None
    scale: SCALE = None
    start: SHARE = None
    end: SHARE = None
    canny: CANNY = None


class PromptField(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A picture as prompt, and how much of it is taken."""

    image: PICTURE = None
    scale: SCALE = None


CONTROL = Annotated[
    dict[Annotated[str, Meta(min_length=1, max_length=64)], ControlField],
    Meta(max_length=8, description="by the names that the model was exported with"),
]


def is_controlled(call: Any) -> bool:
    """Whether a call says anything of controls or pictures as prompts."""
    return bool(call.control or call.ip_adapter or call.guess_mode)


def control_arguments(call: Any, files: Mapping[str, list[bytes]], most_pixels: int) -> dict[str, Any]:
    """What a call says of controls and pictures as prompts, as `Server.submit` takes it; `HttpError` 422."""
    sent = {name: data[0] for key, data in files.items() if (name := control_file(key)) is not None}
    fields: dict[str, ControlField] = {**{n: ControlField() for n in sent}, **(call.control or {})}
    options: dict[str, Any] = {}
    if fields:
        options["control"] = {
            name: _opened(f"control[{name}]", field.image, sent.get(name), most_pixels)
            for name, field in fields.items()
        }
        for argument, key in (
            ("controlnet_conditioning_scale", "scale"),
            ("control_guidance_start", "start"),
            ("control_guidance_end", "end"),
            ("canny", "canny"),
        ):
            by_name = {n: v for n, f in fields.items() if (v := getattr(f, key)) is not None}
            options |= {argument: by_name} if by_name else {}
    if call.guess_mode:
        options["guess_mode"] = True
    if call.ip_adapter is not None or IP_FILE in files:
        field = call.ip_adapter or PromptField()
        own = files[IP_FILE][0] if IP_FILE in files else None
        options["ip_adapter_image"] = _opened(IP_FILE, field.image, own, most_pixels)
        options |= {} if field.scale is None else {"ip_adapter_scale": field.scale}
    return options


def _opened(place: str, text: str | None, data: bytes | None, most_pixels: int) -> Any:
    """The picture of a field or a file, one of which there must be."""
    if (text is None) == (data is None):
        count = "no picture" if text is None else "two pictures"
        raise HttpError(422, "invalid_combination", f"{shown(place)} has {count}; one is taken", param=place[:64])
    if data is None:
        try:
            data = base64.b64decode((text or "").partition(";base64,")[2] or text or "", validate=True)
        except (binascii.Error, ValueError) as error:
            raise HttpError(422, "invalid_image", f"{shown(place)} is no base64", param=place[:64]) from error
    return open_picture(data, most_pixels, name=place)
