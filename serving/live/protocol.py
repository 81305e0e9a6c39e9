"""The messages of a live session, version 1, as bytes; `docs/realtime.md` has the tables.

A client sends JSON texts (`set`, `ack`, `clear`) and binary input pictures; the server sends JSON texts (`hello`,
`set`, `error`) and binary frames. Numbers in headers are little-endian.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from ...errors import CorruptError, FewstepError
from ...values import parse_json
from .frames import Frame
from .pictures import MOST_BYTES
from .settings import LiveSettings

VERSION = 1
SUBPROTOCOL = "fewstep-live-1"
PICTURE, FRAME, UNCHANGED = 1, 2, 3
MOST_TEXT = 128 * 1024
# kind u8, version u8, reserved u16, input's number u32, the client's clock in ms f64
PICTURE_HEADER = struct.Struct("<BBHId")
# kind u8, version u8, reserved u16, frame's number u32, input's number u32, server's latency in us u32, clock f64
FRAME_HEADER = struct.Struct("<BBHIIId")
MOST_MESSAGE = MOST_BYTES + PICTURE_HEADER.size
OPTIONS = "sampler_options"
Number = msgspec.Meta(ge=0, le=2**32 - 1)


class ProtocolError(FewstepError):
    """A message that is none of this protocol; `code` is what the socket is closed with."""

    def __init__(self, found: str, *, code: int = 4400, expected: str = "") -> None:
        super().__init__(found, expected=expected)
        self.code = code


class Set(msgspec.Struct, tag="set", forbid_unknown_fields=True, frozen=True):
    """Change these settings (names and values of `LiveSettings`) for the frames to come."""

    settings: dict[str, str | int | float | list[int] | dict[str, Any] | None]
    id: int = 0
    at: float = 0.0


class Ack(msgspec.Struct, tag="ack", forbid_unknown_fields=True, frozen=True):
    """This frame, and all before it, have been shown: the server may send more."""

    frame: int


class Clear(msgspec.Struct, tag="clear", forbid_unknown_fields=True, frozen=True):
    """Forget the input picture and make frames from noise again."""

    id: int = 0
    at: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """An input picture: a whole PNG, JPEG or WebP file."""

    data: bytes
    id: int
    at: float


Message = Set | Ack | Clear | Picture


def read_text(text: str) -> Set | Ack | Clear:
    """A JSON message of a client; `ProtocolError` for anything else."""
    if len(text) > MOST_TEXT:
        raise ProtocolError(f"a text of {len(text)} characters", code=1009, expected=f"at most {MOST_TEXT}")
    try:
        message: Set | Ack | Clear = msgspec.convert(parse_json(text, "a text", finite=True), Set | Ack | Clear)
    except (msgspec.MsgspecError, CorruptError) as error:
        raise ProtocolError("a text that is no message", expected="JSON of type set, ack or clear") from error
    if isinstance(message, Set) and any(isinstance(v, dict) and k != OPTIONS for k, v in message.settings.items()):
        raise ProtocolError("a setting that is an object", expected=f"{OPTIONS} alone to be one")
    numbers = (message.frame,) if isinstance(message, Ack) else (message.id,)
    if not all(0 <= n < 2**32 for n in numbers):
        raise ProtocolError("a number out of range", expected="0 to 4294967295")
    return message


def read_binary(data: bytes) -> Picture:
    """An input picture of a client, not yet decoded; `ProtocolError` for anything else."""
    if len(data) > MOST_MESSAGE:
        raise ProtocolError(f"a message of {len(data)} bytes", code=1009, expected=f"at most {MOST_MESSAGE}")
    if len(data) <= PICTURE_HEADER.size:
        raise ProtocolError(f"a message of {len(data)} bytes", expected=f"a header of {PICTURE_HEADER.size} and a file")
    kind, version, reserved, number, at = PICTURE_HEADER.unpack_from(data)
    if (kind, version, reserved) != (PICTURE, VERSION, 0) or not math.isfinite(at):
        raise ProtocolError("a binary message of another kind", expected=f"kind {PICTURE} of version {VERSION}")
    return Picture(data=data[PICTURE_HEADER.size :], id=number, at=at)


def write_picture(data: bytes, *, number: int, at: float) -> bytes:
    """An input picture, for clients."""
    return PICTURE_HEADER.pack(PICTURE, VERSION, 0, number, at) + data


def write_frame(frame: Frame, jpeg: bytes, *, number: int, at: float) -> bytes:
    """A frame: `number` and `at` are those that the client gave to the newest input it shows."""
    latency_us = min(2**32 - 1, round(1e3 * frame.latency_ms))
    return FRAME_HEADER.pack(FRAME, VERSION, 0, frame.index % 2**32, number, latency_us, at) + jpeg


def write_unchanged(*, number: int, at: float) -> bytes:
    """The answer to an input that showed nothing new: a header alone."""
    return FRAME_HEADER.pack(UNCHANGED, VERSION, 0, 0, number, 0, at)


def read_frame(data: bytes) -> tuple[int, int, int, float, float, bytes]:
    """For clients: kind, the frame's number, the input's number, the server's latency in ms, the clock, the JPEG."""
    kind, version, _, index, number, latency_us, at = FRAME_HEADER.unpack_from(data)
    if version != VERSION:
        raise ProtocolError(f"version {version}", expected=str(VERSION))
    return kind, index, number, latency_us / 1e3, at, data[FRAME_HEADER.size :]


def write_hello(settings: LiveSettings, **facts: Any) -> str:
    """The first message of the server: the settings in force, and what it offers."""
    return json.dumps({"type": "hello", "version": VERSION, "settings": asdict(settings), **facts})


def write_set(
    settings: LiveSettings, *, number: int, commands: Mapping[str, str] | None = None, warnings: Sequence[str] = ()
) -> str:
    """The answer to `set`: the settings now in force, the commands that make such frames again, what has no effect."""
    more = {"commands": dict(commands or {}), "warnings": list(warnings)}
    return json.dumps({"type": "set", "id": number, "settings": asdict(settings), **more})


def write_error(error: FewstepError, *, number: int | None = None) -> str:
    """An error as data. Messages of fewstep's errors name no paths and no prompts."""
    return json.dumps(
        {
            "type": "error",
            "error": type(error).__name__,
            "message": error.found[:300],
            "expected": error.expected[:300],
            "remedy": error.remedy[:300],
            "id": number,
        }
    )
